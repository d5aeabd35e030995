"""How large a recipe's model is, and what its checkpoints and its ranks take, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrscale.config.recipe import Recipe
from lrscale.latent.backbone import Backbone
from lrscale.latent.hf_layout import dtype_of

_MOMENT_BYTES = {"bfloat16": 12, "float32": 8, "float64": 16}
"""Adam's state a parameter: two moments, and a float32 master copy of weights that are narrower."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters of policy and projector together, in numbers and in bytes."""

    parameters: int
    weight_bytes: int
    """The weights as they are trained."""
    state_bytes: int
    """Weights and optimizer state: what a checkpoint holds."""
    largest_bytes: int
    """The largest single tensor."""


def measure(recipe: Recipe, source: str) -> ModelSize:
    """From a model's config.json (`source`: a folder or a hub id), by building it without memory (torch's meta device).

    Raises:
        ValueError, OSError: the configuration cannot be had, or has no MLP for a projector.
    """
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    block = sum(parameter.numel() for parameter in Backbone(model).last_mlp().parameters())
    sizes = [parameter.numel() for parameter in model.parameters()]
    parameters = sum(sizes) + recipe.projector.layers * block
    width = dtype_of(recipe.model.dtype).itemsize
    return ModelSize(
        parameters=parameters,
        weight_bytes=parameters * width,
        state_bytes=parameters * (width + _MOMENT_BYTES[recipe.model.dtype]),
        largest_bytes=max(sizes) * width,
    )


def checkpoint_bytes(recipe: Recipe, size: ModelSize) -> int:
    """What the run's folder grows to: checkpoints of the stage that runs, one of each that is over, exported models.

    While a checkpoint is written the former ones are all still there.
    """
    arms = len(recipe.stages.rl.arms)
    kept = recipe.checkpoints
    at_once = kept.keep_last + kept.keep_best + 1
    ended = arms  # projector SFT, and all arms but the one that runs
    return (at_once + ended) * size.state_bytes + arms * size.weight_bytes


def host_bytes(recipe: Recipe, size: ModelSize) -> int:
    """The most memory of a node that its ranks need at once, data and libraries aside."""
    ranks, share = recipe.ranks_per_node, recipe.ranks_per_node / recipe.world_size
    parallel = recipe.parallel
    if recipe.model.device == "cpu":  # gradients too
        whole = recipe.world_size > 1 and parallel.gather != "per_layer"
        return int((size.state_bytes + size.weight_bytes) * share) + (ranks * size.weight_bytes if whole else 0)
    if parallel.kind == "single":
        return size.weight_bytes
    needed = ranks * 2 * size.largest_bytes  # a tensor is read and copied at a time
    moments = size.state_bytes - size.weight_bytes
    if parallel.offload_optimizer or parallel.offload_between_phases:
        needed += int((moments + size.weight_bytes) * share)
    if parallel.offload_parameters:
        needed += int(size.weight_bytes * share)
    return needed
