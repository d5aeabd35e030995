"""What a login node can tell of a recipe: everything but the compute nodes themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lrscale.config.diagnosis import Check
from lrscale.config.recipe import Recipe
from lrscale.stages.preflight.files import check_files
from lrscale.stages.preflight.reward import check_reward
from lrscale.stages.preflight.sources import size_of, source_of
from lrscale.stages.preflight.storage import check_room, check_shared
from lrscale.stages.preflight.tokens import check_tokenizer


def look_around(recipe: Recipe, recipe_dir: Path, runs_dir: Path) -> Iterator[Check]:
    """One finding after the other, as they are made."""
    yield from check_files(recipe, node="")
    source = source_of(recipe)
    if isinstance(source, Check):
        yield source
    else:
        yield from check_tokenizer(recipe, source)
        size = size_of(recipe, source)
        yield size if isinstance(size, Check) else check_room(recipe, _existing(runs_dir / recipe.name), size)
    yield check_shared(recipe, _existing(runs_dir))
    yield check_reward(recipe, recipe_dir)
    for name in ("GPUs", "host memory", "network"):
        yield Check(name, "not checked", "every node is asked when the job starts")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), path)
