"""What starts the ranks of a run on this machine: the files in its run directory and the command line."""

from __future__ import annotations

import difflib
import json
import random
import reprlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lrscale
from lrscale.config.errors import Place, Problem, RecipeError
from lrscale.config.load import LoadedRecipe
from lrscale.config.recipe import Recipe
from lrscale.config.shipped import shipped_ds_configs
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.rundir import write_whole
from lrscale.plan.accelerate import accelerate_yaml
from lrscale.plan.deepspeed import as_offloaded, resolve
from lrscale.plan.model_config import ModelConfigError
from lrscale.plan.model_dims import ModelDims, dims_of_config, known_dims, read_dims
from lrscale.plan.states import ZeroSettings, zero_settings
from lrscale.plan.topology import longest_prompt, longest_sequence

_BUILTINS = {"builtin:tiny": "tasks/assets/tiny_base"}
_PORTS = range(20_000, 30_000)
"""Below what systems hand out by themselves (from 32768 on Linux), and away from everybody's 29500."""


def job_files(loaded: LoadedRecipe) -> dict[str, str]:
    """Names and texts of the files that a job needs in its run directory beside recipe.json.

    Raises:
        RecipeError: this release cannot start it, or its DeepSpeed configuration cannot be resolved.
    """
    recipe = loaded.recipe
    if recipe.parallel.kind == "single":
        return {}
    files = {"accelerate.yaml": accelerate_yaml(recipe.cluster.nodes, recipe.ranks_per_node)}
    if recipe.parallel.kind == "zero3":
        files["ds_config.json"] = json.dumps(ds_config(loaded), indent=2) + "\n"
    return files


def require_one_node(loaded: LoadedRecipe) -> None:
    """Raises RecipeError if a recipe for several nodes was to run on this machine."""
    nodes = loaded.recipe.cluster.nodes
    if nodes > 1:
        message = f"cluster.nodes is {nodes}, but this machine is one node (--local)"
        raise RecipeError([_found(loaded, "cluster.nodes", message, "leave --local out, or --set cluster.nodes=1")])


def write_job_files(run_dir: Path, files: Mapping[str, str]) -> None:
    """Puts the files of a job where its ranks read them; LaunchError where that cannot be done."""
    try:
        for name, text in files.items():
            write_whole(run_dir / name, text)
    except OSError as error:
        raise LaunchError(
            f"{error.filename or run_dir} cannot be written: {error.strerror}",
            code=ExitCode.PREFLIGHT,
            help="make room or rights there",
        ) from error


def job_command(recipe: Recipe, run_dir: Path) -> tuple[str, list[str]]:
    """The module that runs the job, and its arguments: the worker itself, or what starts several of it."""
    if recipe.world_size == 1:
        return "lrscale.stages", ["worker", str(run_dir)]
    arguments = ["--config_file", str(run_dir / "accelerate.yaml"), "--main_process_port", str(free_port())]
    # Said on the command line because torchrun also takes it from PET_ variables.
    arguments += ["--max_restarts", "0", "--module", "lrscale.stages", "worker", str(run_dir)]
    return "lrscale.parallel.agent", arguments


def free_port() -> int:
    """A TCP port of this machine that nobody listens on.

    Raises:
        LaunchError: none was found.
    """
    for port in random.sample(_PORTS, 50):
        with socket.socket() as candidate:
            try:
                candidate.bind(("", port))
            except OSError:
                continue
            return port
    raise LaunchError(
        f"no free port between {_PORTS.start} and {_PORTS.stop - 1} for the ranks to meet at", code=ExitCode.TRY_LATER
    )


def warnings_of(recipe: Recipe) -> list[str]:
    """What a user should hear before the run starts."""
    if recipe.parallel.lockstep or recipe.world_size == 1:
        return []
    return ["warning: parallel.lockstep is false: ranks whose loops differ in length hang or compute something wrong"]


def ds_config(loaded: LoadedRecipe) -> dict[str, Any]:
    """DeepSpeed's configuration of a run, as far as it can be resolved here. RecipeError where it cannot."""
    recipe, key = loaded.recipe, "parallel.ds_config"
    path = shipped_ds_configs().get(recipe.parallel.ds_config) or Path(recipe.parallel.ds_config)
    try:
        template = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(template, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        message = f"{path} cannot be read: {error}"
        raise RecipeError([_found(loaded, key, message, "give a DeepSpeed JSON file")]) from error
    try:
        known = known_dims().get(recipe.model.path)
        hidden_size = known.hidden if known is not None else hidden_size_of(recipe.model.path)
        return resolve(template, recipe, hidden_size, recipe.world_size)
    except ValueError as error:
        raise RecipeError([_found(loaded, key, f"{path}: {line}", "") for line in str(error).splitlines()]) from error


def planned_recipe(loaded: LoadedRecipe, dims: ModelDims) -> tuple[Recipe, ZeroSettings | None]:
    """What a plan counts with: the recipe with what its DeepSpeed file offloads, and that file's values.

    Raises:
        RecipeError: the file cannot be resolved.
    """
    if loaded.recipe.parallel.kind != "zero3":
        return loaded.recipe, None
    config = ds_config(loaded)
    return as_offloaded(loaded.recipe, config), zero_settings(dims.hidden, config)


def hidden_size_of(model: str) -> int | None:
    """A model's width, from its config.json; None where that is not on this machine or does not say."""
    config = _config(model)
    text_part = config.get("text_config", {})
    size = config.get("hidden_size", text_part.get("hidden_size") if isinstance(text_part, dict) else None)
    return size if isinstance(size, int) else None


def dims_of(model: str) -> ModelDims | None:
    """A model's dimensions: known ones, else from its config.json; None where neither tells."""
    return known_dims().get(model) or dims_of_config(_config(model))


def require_dims(loaded: LoadedRecipe) -> ModelDims:
    """A model's dimensions, for a plan that is nothing without them.

    Raises:
        RecipeError: neither shipped nor in a config.json on this machine, or that is broken (every key is named).
    """
    model, key = loaded.recipe.model.path, "model.path"
    known = known_dims()
    if model in known:
        return known[model]
    path = _config_json(model)
    if path is None or not path.exists():
        near = difflib.get_close_matches(model, known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        message = f"{model}: no config.json of it is on this machine, and its dimensions do not come with lrscale"
        help_ = f"{hint}give a folder with its config.json; the weights are not needed"
        raise RecipeError([_found(loaded, key, message, help_)])
    try:
        return read_dims(_keys(path))
    except ModelConfigError as error:
        help_ = "mend the file, or take it from the hub"
        raise RecipeError([_found(loaded, key, f"{path}: {error}", help_)]) from error


def require_positions(loaded: LoadedRecipe, dims: ModelDims) -> None:
    """Raises RecipeError where a sequence may outgrow the model: the ranks would refuse the first that does."""
    problem = outgrown(loaded, dims)
    if problem is not None:
        raise RecipeError([problem])


def outgrown(loaded: LoadedRecipe, dims: ModelDims) -> Problem | None:
    """What is wrong where the longest sequence that the recipe allows has no place in the model."""
    recipe, limit = loaded.recipe, dims.positions
    longest, prompt, new = longest_sequence(recipe), longest_prompt(recipe), recipe.rollout.max_new_tokens
    if limit is None or longest <= limit:
        return None
    key = "task.max_prompt_tokens" if prompt else "rollout.max_new_tokens"
    sum_ = f"task.max_prompt_tokens {prompt} + rollout.max_new_tokens {new}" if prompt else f"{key} {new}"
    message = f"a sequence may take {longest} positions ({sum_}), {recipe.model.path} has {limit}"
    fitting = f"--set {key}={limit - new}, or " if prompt and limit > new else ""
    return _found(loaded, key, message, f"{fitting}lower rollout.max_new_tokens")


def _config(model: str) -> dict[str, Any]:
    """A model's config.json, empty where it is not on this machine or not to be read: the ranks say what is wrong."""
    path = _config_json(model)
    try:
        return _keys(path) if path is not None else {}
    except ModelConfigError:
        return {}


def _keys(path: Path) -> dict[str, Any]:
    """What a config.json holds; ModelConfigError where that is nothing."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"it cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or not config:
        raise ModelConfigError(f"it holds {reprlib.repr(config)} in place of the keys of a model")
    return config


def _config_json(model: str) -> Path | None:
    if model in _BUILTINS:
        return Path(lrscale.__file__).parent / _BUILTINS[model] / "config.json"
    if Path(model).is_dir():
        return Path(model) / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _found(loaded: LoadedRecipe, key: str, message: str, help_: str) -> Problem:
    return Problem(loaded.places.get(key, Place("defaults")), key, message, help_)
