"""The recipes, DeepSpeed configurations and dimensions of models that come with lrscale."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lrscale.config.errors import Place, Problem, RecipeNotFoundError

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_recipes() -> dict[str, Path]:
    """Names and files of the shipped recipes: in a wheel under lrscale/share/, in a checkout beside the package."""
    return {path.stem: path for path in sorted(_shared("launchers").glob("*.yaml"))}


def shipped_ds_configs() -> dict[str, Path]:
    """Names and files of the shipped DeepSpeed configurations, found as recipes are."""
    return {path.stem: path for path in sorted(_shared("ds_configs").glob("*.json"))}


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """What a plan needs of a model that many people use."""

    ids: tuple[str, ...]
    """Hub ids of models of this size."""
    config: Mapping[str, Any]
    """The keys of its config.json that tell how large it is."""
    source: str


@cache
def shipped_models() -> tuple[ShippedModel, ...]:
    """Models whose dimensions are known without a network."""
    text = (plan_data() / "models.json").read_text(encoding="utf-8")
    return tuple(ShippedModel(tuple(entry["ids"]), entry["config"], entry["source"]) for entry in json.loads(text))


def plan_data() -> Path:
    """The folder with what plans are worked out from: models.json and hardware.yaml."""
    return _PACKAGE / "plan" / "data"


def shared_folder() -> Path:
    """The folder with launchers/, ds_configs/ and slurm/."""
    folders = (_PACKAGE / "share", _PACKAGE.parent)
    return next((folder for folder in folders if (folder / "launchers").is_dir()), folders[0])


def _shared(name: str) -> Path:
    return shared_folder() / name


def find_recipe(name: str | Path) -> Path:
    """A recipe file by its path, or a shipped recipe by its name (`tiny-cpu`).

    Raises:
        RecipeNotFoundError: it is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    reason = "is a folder" if path.is_dir() else "does not exist"
    hint = f"did you mean {near[0]}? " if near else ""
    message = f"the recipe {reason}: {name}"
    raise RecipeNotFoundError([Problem(Place(str(name)), "", message, f"{hint}shipped recipes: {', '.join(shipped)}")])


def summary(path: Path) -> str:
    """A recipe's first comment line, up to the end of its first sentence."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").partition(". ")[0].rstrip(".")
