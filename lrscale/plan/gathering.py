"""Whether ranks that decode gather all weights at once, or layer by layer."""

from __future__ import annotations

from lrscale.config.recipe import Recipe
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.states import ELEMENT_BYTES, weight_elements


def whole_copy_gib(recipe: Recipe, dims: ModelDims) -> float:
    """The weights of policy and projector in one piece."""
    return weight_elements(recipe, dims) * ELEMENT_BYTES[recipe.model.dtype] / 2**30


def gather(recipe: Recipe, dims: ModelDims) -> str:
    """`parallel.gather` with `auto` decided as the ranks would."""
    parallel = recipe.parallel
    if parallel.gather != "auto":
        return parallel.gather
    return "whole" if whole_copy_gib(recipe, dims) <= parallel.whole_gather_gib else "per_layer"
