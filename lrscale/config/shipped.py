"""The recipes and DeepSpeed configurations that come with lrscale."""

from __future__ import annotations

import difflib
from pathlib import Path

from lrscale.config.errors import Place, Problem, RecipeNotFoundError

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_recipes() -> dict[str, Path]:
    """Names and files of the shipped recipes: in a wheel under lrscale/share/, in a checkout beside the package."""
    return {path.stem: path for path in sorted(_shared("launchers").glob("*.yaml"))}


def shipped_ds_configs() -> dict[str, Path]:
    """Names and files of the shipped DeepSpeed configurations, found as recipes are."""
    return {path.stem: path for path in sorted(_shared("ds_configs").glob("*.json"))}


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
