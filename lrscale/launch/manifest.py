"""manifest.json: what a run was started from, for whoever has to repeat it. Holds no secrets."""

from __future__ import annotations

import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lrscale
from lrscale.config.recipe import Recipe

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy")
_SECRET_NAME = re.compile(r"token(?!s)|secret|password|passwd|api_?key|credential", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_HUB_TOKEN = re.compile(r"\b(hf|sk|ghp)_[A-Za-z0-9]{8,}")
_HIDDEN = "***"


def build_manifest(recipe: Recipe, command: Sequence[str]) -> dict[str, Any]:
    """Versions, git revision, host, command line and seed of a run that is about to begin."""
    return {
        "lrscale": lrscale.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": _versions(),
        "git": git_revision(Path(lrscale.__file__).resolve().parent),
        "host": socket.gethostname(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_secrets(command),
        "executable": sys.executable,
        "seed": recipe.seed,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds `folder` and whether it was changed; None outside a checkout."""
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        changed = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
        tracked = _git(folder, "ls-files", "--", "__init__.py")
    except (OSError, subprocess.SubprocessError):
        return None
    # A package installed into a virtual environment inside somebody's repository is not part of it.
    return {"revision": revision, "changed": changed} if tracked else None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def without_secrets(command: Sequence[str]) -> list[str]:
    """The command line with the values of secret-looking keys and logins in URLs blotted out."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        name, equals, _ = word.partition("=")
        if hide_next:
            shown.append(_HIDDEN)
        elif equals and _SECRET_NAME.search(name):
            shown.append(f"{name}={_HIDDEN}")
        else:
            shown.append(_HUB_TOKEN.sub(_HIDDEN, _URL_LOGIN.sub(_HIDDEN, word)))
        hide_next = not equals and word.startswith("--") and bool(_SECRET_NAME.search(word))
    return shown
