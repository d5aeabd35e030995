"""From a DeepSpeed JSON file with "auto" in it and a recipe to the configuration that the ranks run with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from lrscale.config.recipe import Recipe
from lrscale.config.zero3_rules import AUTO, DEVICE_KEYS, WIDTH_KEYS, put, settle, unsettled, value_at

_OURS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "wall_clock_breakdown": False,
    "steps_per_print": 10**9,
}
"""Not in a file of the user's own: what lrscale's way of using DeepSpeed needs."""
_FOREIGN = ("optimizer", "scheduler", "fp16", "amp")
_OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}
"""DeepSpeed's section to the recipe's key."""


def resolve(template: Mapping[str, Any], recipe: Recipe, hidden_size: int | None, world_size: int) -> dict[str, Any]:
    """The template with every "auto" replaced by its value; nothing in it is left to guess.

    Args:
        template: A file of ds_configs/, or one of the user's own, as parsed.
        recipe: Decides precision and offload; files that contradict it are refused.
        hidden_size: The model's width. None leaves the three keys that need it to the ranks
            (`zero3_rules.settle`), as `model.device: auto` does with what needs a GPU.
        world_size: Number of ranks.

    Raises:
        ValueError: naming every key that cannot be resolved, or contradicts the recipe, a line each.
    """
    stage = value_at(template, "zero_optimization.stage")
    if stage != 3:
        raise ValueError(f"zero_optimization.stage is {stage}; parallel.kind zero3 needs stage 3")
    problems = [f"{key}: lrscale brings its own, take it out" for key in _FOREIGN if key in template]
    if value_at(template, "zero_optimization.zero_hpz_partition_size") not in (None, 1):
        problems.append(
            "zero_optimization.zero_hpz_partition_size: lrscale fills each rank's part of the weights, of which hpZ's "
            "second copy knows nothing: write 1"
        )
    config = copy.deepcopy(dict(template))
    for key, value in _decided(recipe, world_size).items():
        written = value_at(config, key)
        if written in (None, AUTO):
            put(config, key, value)
        elif written != value and key in _binding(recipe):
            problems.append(f"{key} is {_json(written)}, but this run needs {_json(value)}: write {_json(AUTO)}")
    for key, value in _OURS.items():
        config.setdefault(key, value)
    problems += _offload(config["zero_optimization"], recipe)
    on_gpu = {"cpu": False, "cuda": True}.get(recipe.model.device)
    config = settle(config, hidden_size=hidden_size, on_gpu=on_gpu)
    open_keys = (*(WIDTH_KEYS if hidden_size is None else ()), *(DEVICE_KEYS if on_gpu is None else ()))
    known = ", ".join(_resolvable(recipe, world_size))
    problems += [
        f'{key} is "auto", for which lrscale has no rule: write a value ("auto" goes with {known})'
        for key in unsettled(config)
        if key not in open_keys
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return config


def _decided(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """What the recipe decides, by dotted key."""
    narrow = recipe.model.dtype == "bfloat16"
    gradients = "bf16" if narrow and not recipe.parallel.fp32_gradients else "fp32"
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16.enabled": narrow,
        "data_types.grad_accum_dtype": gradients,
        "communication_data_type": gradients,
    }


def _binding(recipe: Recipe) -> Iterator[str]:
    """Keys that a file may not set to something else: the run would fail, or not be what the recipe says."""
    yield from ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    yield from ("gradient_clipping", "bf16.enabled")
    if recipe.parallel.fp32_gradients or recipe.model.dtype == "float32":
        yield from ("data_types.grad_accum_dtype", "communication_data_type")


def _offload(zero: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    """Fills in the offload sections, or takes them out; yields contradictions."""
    for section, key in _OFFLOADS.items():
        wanted = bool(getattr(recipe.parallel, key))
        written = zero.get(section, {})
        device = written.get("device", AUTO if written or wanted else "none")
        if device == "none" and section in zero and wanted:
            yield f'zero_optimization.{section}.device is "none", but parallel.{key} is true: write "auto"'
        if device == AUTO:
            device = "cpu" if wanted else "none"
        if device == "none":
            zero.pop(section, None)
        else:
            zero[section] = {"pin_memory": AUTO, **written, "device": device}


def _resolvable(recipe: Recipe, world_size: int) -> Iterator[str]:
    yield from _decided(recipe, world_size)
    yield from (*WIDTH_KEYS, *DEVICE_KEYS)
    yield from (f"zero_optimization.{section}.device" for section in _OFFLOADS)


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def as_offloaded(recipe: Recipe, config: Mapping[str, Any]) -> Recipe:
    """The recipe with the offload that its resolved DeepSpeed file asks for: a file may do so by itself."""
    zero = config.get("zero_optimization", {})
    asked = {
        field: True
        for section, field in _OFFLOADS.items()
        if (zero.get(section) or {}).get("device", "none") not in ("none", None)
    }
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=asked)})
