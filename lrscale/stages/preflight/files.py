"""The files that a run reads: the model's weights, whole, and the task's data."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lrscale.config.diagnosis import Check
from lrscale.config.recipe import Recipe
from lrscale.config.reward import FunctionRewardConfig, FunctionsRewardConfig
from lrscale.config.task import JsonlConfig, NextChapterConfig
from lrscale.parallel.loading import model_source

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def check_files(recipe: Recipe, node: str) -> list[Check]:
    """Whether this node sees every file of the model and the data."""
    return [_model(recipe, node), *_data(recipe, node)]


def _model(recipe: Recipe, node: str) -> Check:
    path = recipe.model.path
    try:
        source = model_source(path)
    except ValueError as error:
        return _missing(str(error), "copy the model there, or mend model.path", node)
    if not Path(source).is_dir():
        return _from_hub(source, node)
    index = Path(source) / _INDEX
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [_SINGLE]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return _missing(f"{index} cannot be read ({error})", "copy or download the model again", node)
    absent = [name for name in names if not (Path(source) / name).is_file()]
    if absent:
        found = f"{source} lacks {len(absent)} of {len(names)} weight files, {absent[0]} first"
        return _missing(found, "copy or download the model again; weights must be safetensors", node)
    total = sum((Path(source) / name).stat().st_size for name in names)
    found = f"{path}: {len(names)} weight file{'s' * (len(names) > 1)}, {_size(total)}"
    return Check("model files", "ok", found, node=node)


def _from_hub(name: str, node: str) -> Check:
    """A hub id: in the cache with all its weights, or to be downloaded by every node."""
    index = try_to_load_from_cache(name, _INDEX)
    wanted = [_SINGLE]
    if isinstance(index, str):
        wanted = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    there = [file for file in wanted if isinstance(try_to_load_from_cache(name, file), str)]
    if len(there) == len(wanted):
        return Check("model files", "ok", f"{name}: {len(there)} weight files in the hub's cache", node=node)
    share = f"{len(there)} of {len(wanted)} weight files in the hub's cache" if there else "not in the hub's cache"
    return Check(
        "model files",
        "warning",
        f"{name}: {share}: the job will download it",
        help=f"compute nodes often have no internet: first `hf download {name}` where there is one, HF_HOME shared",
        node=node,
    )


def _missing(found: str, help_: str, node: str) -> Check:
    needed = "a folder with config.json and all its safetensors, on every node"
    return Check("model files", "failed", found, needed=needed, help=help_, node=node, blames_node=True)


def _data(recipe: Recipe, node: str) -> list[Check]:
    task = recipe.task
    named = (
        {"task.train": task.train, "task.eval": task.eval} if isinstance(task, JsonlConfig | NextChapterConfig) else {}
    )
    if isinstance(recipe.reward, FunctionRewardConfig):
        named["reward.path"] = recipe.reward.path
    if isinstance(recipe.reward, FunctionsRewardConfig):
        named |= {f"reward.functions.{one.label}": one.path for one in recipe.reward.functions}
    absent = {key: path for key, path in named.items() if not Path(path).is_file()}
    if absent:
        found = "; ".join(f"{key} {path}: no such file" for key, path in absent.items())
        needed, help_ = "these files, readable", "put them on a file system that all nodes share"
        return [Check("data files", "failed", found, needed=needed, help=help_, node=node, blames_node=True)]
    return [Check("data files", "ok", ", ".join(named.values()), node=node)] if named else []


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
