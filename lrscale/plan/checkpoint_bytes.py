"""Bytes of a checkpoint on disk: what `lrscale.parallel.engine_state` and `checkpoint` write, file by file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lrscale.config.recipe import Recipe
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.states import ELEMENT_BYTES, weight_elements
from lrscale.plan.tensors import TensorShape, model_tensors, projector_tensors

Group = Literal["base", "projector"]
GROUPS: tuple[Group, ...] = ("base", "projector")
_ENTRY = 108
"""Of one tensor in a safetensors header, its name left out: type, shape and offsets, and its range in the metadata."""
_RANK_FILE = 25_000
"""rank-N.json: the states of a rank's random generators."""
_SHARED_FILES = 4_000
"""manifest.json, engine.json and state.json, and what the manifest says of each rank."""


def checkpoint_bytes(recipe: Recipe, dims: ModelDims, ranks: int, trained: Sequence[Group] = GROUPS) -> int:
    """Of one checkpoint.

    Weights as they are; of each trained group two moments (float32, float64 for a float64 model), masters where
    weights are narrower, and Adam's step a tensor. Without padding: pieces are cut to what is real.
    """
    element = ELEMENT_BYTES[recipe.model.dtype]
    shares = 1 if recipe.parallel.kind == "single" else ranks
    total = _SHARED_FILES + shares * (_RANK_FILE + 400)
    groups: tuple[tuple[Group, Sequence[TensorShape]], ...] = (
        ("base", model_tensors(dims)),
        ("projector", projector_tensors(dims, recipe.projector.layers, recipe.projector.kind)),
    )
    for group, tensors in groups:
        narrow = element < 4
        pieces = 1 + (2 + narrow if group in trained else 0)
        of_state = 2 * max(element, 4) + (4 if narrow else 0) if group in trained else 0
        for tensor in tensors:
            share = -(-tensor.elements // shares)
            files = -(-tensor.elements // share)  # a tensor smaller than the number of ranks is not on all of them
            total += tensor.elements * (element + of_state)
            total += files * pieces * (2 * len(tensor.name) + _ENTRY + (30 if pieces > 1 else 10))
            total += (4 + 2 * len(tensor.name) + _ENTRY + 30) if group in trained else 0
    return total


def kept_bytes(recipe: Recipe, dims: ModelDims, ranks: int) -> int:
    """All that a run has on disk at its end, and the checkpoint that is being written: those of the arm at hand, the last of
    every stage before it (`lrscale.stages.pipeline`), a model an arm, and weights for engines on nodes of their own."""
    rl, kept = recipe.stages.rl, recipe.checkpoints.keep_last + recipe.checkpoints.keep_best + 1
    whole = checkpoint_bytes(recipe, dims, ranks)
    weights = ELEMENT_BYTES[recipe.model.dtype] * weight_elements(recipe, dims)
    rollout = recipe.rollout
    handed = rollout.kind == "vllm" and rollout.placement == "separate" and rollout.transport == "files"
    before = checkpoint_bytes(recipe, dims, ranks, ("projector",)) + (len(rl.arms) - 1) * whole
    return before + kept * whole + (len(rl.arms) + handed) * weights
