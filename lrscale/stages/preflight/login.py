"""What a login node can tell of a recipe: everything but the compute nodes themselves."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from lrscale.config.diagnosis import Check
from lrscale.config.recipe import Recipe
from lrscale.stages.preflight.files import check_files
from lrscale.stages.preflight.reward import check_reward
from lrscale.stages.preflight.sources import size_of, source_of
from lrscale.stages.preflight.storage import check_room, check_shared
from lrscale.stages.preflight.tokens import check_tokenizer


def look_around(recipe: Recipe | None, runs_dir: Path) -> Iterator[Check]:
    """One finding after the other, as they are made; without a recipe the installation's alone."""
    yield _packages(recipe)
    if recipe is None:
        return
    yield from check_files(recipe, node="")
    source = source_of(recipe)
    if isinstance(source, Check):
        yield source
    else:
        yield from check_tokenizer(recipe, source)
        size = size_of(recipe, source)
        yield size if isinstance(size, Check) else check_room(recipe, _existing(runs_dir / recipe.name), size)
    yield check_shared(recipe, _existing(runs_dir))
    yield check_reward(recipe, runs_dir)
    for name in ("GPUs", "host memory", "network"):
        yield Check(name, "not checked", "the job's first step asks every node")


def _packages(recipe: Recipe | None) -> Check:
    """What of the installation the recipe needs, by importing it."""
    found = [f"torch {torch.__version__} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU only'})"]
    for name in ("transformers", "accelerate", "deepspeed"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            if name != "deepspeed" or (recipe is not None and recipe.parallel.kind == "zero3"):
                return Check("packages", "failed", f"{name} is not installed", name, f"pip install {name}")
    if recipe is not None and recipe.model.device == "cuda" and torch.version.cuda is None:
        needed = "a CUDA build, since model.device is cuda"
        return Check("packages", "failed", ", ".join(found), needed, "pip install torch, from PyPI's own index")
    return Check("packages", "ok", ", ".join(found))


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), path)
