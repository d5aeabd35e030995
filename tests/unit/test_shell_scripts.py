"""The shell scripts that people read and edit: valid, and free of what shellcheck knows to go wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lrscale.config.load import load_recipe
from lrscale.launch.job_env import job_env

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [ROOT / "slurm" / "train.sh", ROOT / "slurm" / "split.sh", ROOT / "launchers" / "node.sh"]
needs_shellcheck = pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (apt-get install shellcheck)"
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script: Path) -> None:
    """Locks out what sbatch --test-only lets pass: syntax errors, CRLF, options after the first command."""
    text = script.read_bytes().decode()
    assert text.startswith("#!/bin/bash\n") and "\r" not in text
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = text.splitlines()
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]


@needs_shellcheck
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def settings(folder: Path) -> set[str]:
    text = job_env(load_recipe((), (), slurm=True).recipe, folder, python="python", share=folder)
    return set(re.findall(r"^(\w+)=", text, re.MULTILINE))


def test_every_setting_is_read(tmp_path: Path) -> None:
    """Locks out a setting that is written into job.env and that no script looks at."""
    code = "\n".join(re.sub(r"^ *#.*", "", script.read_text(), flags=re.MULTILINE) for script in SCRIPTS)
    assert not {name for name in settings(tmp_path) if not re.search(rf"\b{name}\b", code)}


@needs_shellcheck
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_setting_that_is_read_is_written(script: Path, tmp_path: Path) -> None:
    """Locks out a variable that a script reads, that nobody sets, and that `set -u` finds in the middle of the night."""
    bare = re.sub(r"^# shellcheck.*", "", script.read_text(), flags=re.MULTILINE)
    command = ["shellcheck", "--include=SC2154", "--format=gcc", "-"]
    done = subprocess.run(command, input=bare, capture_output=True, text=True)
    unassigned = set(re.findall(r"warning: (\w+) is referenced", done.stdout))
    assert unassigned and unassigned <= settings(tmp_path)
