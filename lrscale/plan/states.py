"""What a rank keeps all the time: its share of weights, gradients and optimizer state, and what stays whole.

Read off DeepSpeed 0.19's `runtime/zero/stage3.py` and `partition_parameters.py`, and lrscale's own optimizer
(`lrscale.parallel.optimizer`) for the other kinds; benchmarks/plan_against_reality.py compares with live tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lrscale.config.recipe import Recipe
from lrscale.config.zero3_rules import WIDTH_KEYS, value_at, width_values
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.tensors import model_tensors, projector_tensors

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
_DEFAULTS = {"stage3_max_live_parameters": 10**9, "sub_group_size": 10**9}
_HOST_FACTOR = 1.5
"""Of an offloaded optimizer's 16 bytes, for buffers: `additional_buffer_factor` of DeepSpeed's own estimator."""
_ENGINES = 2
"""DeepSpeed engines side by side, of the base and of the projector (`lrscale.parallel.zero3`), each with buckets."""


@dataclass(frozen=True, slots=True)
class ZeroSettings:
    """Values of a DeepSpeed file that decide memory, in elements."""

    reduce_bucket: int
    prefetch: int
    persistence: int
    """Tensors up to this size stay whole on every rank."""
    max_live: int
    """Elements of other ranks' weights that stay gathered at once."""
    sub_group: int
    """Elements that the optimizer steps at once."""


def zero_settings(hidden: int, config: Mapping[str, Any] | None = None) -> ZeroSettings:
    """From a resolved DeepSpeed configuration; without one, what the files of ds_configs/ come to."""
    found = width_values(hidden)
    for key in (*WIDTH_KEYS, *(f"zero_optimization.{name}" for name in _DEFAULTS)):
        value = value_at(config or {}, key)
        found.setdefault(key, _DEFAULTS.get(key.rpartition(".")[2], 0))
        if isinstance(value, int | float):
            found[key] = int(value)
    reduce_bucket, prefetch, persistence, max_live, sub_group = found.values()
    return ZeroSettings(reduce_bucket, prefetch, persistence, max_live, sub_group)


@dataclass(frozen=True, slots=True)
class RankStates:
    """Bytes of one rank."""

    weights: int
    gradients: int
    masters: int
    """float32 copies of the weights."""
    moments: int
    persistent: int
    """Whole copies of small tensors, beside the rank's share of them."""
    buckets: int
    """In which gradients are reduced."""
    host: int
    """In CPU memory: what is offloaded, with its buffers."""
    passing: bool
    """Whether gradients are there only during an update (DeepSpeed keeps a buffer for them all the time)."""

    @property
    def states(self) -> int:
        """Weights, gradients, masters and moments on the device, during an update."""
        return self.weights + self.gradients + self.masters + self.moments

    @property
    def resting(self) -> int:
        """The same between updates."""
        return self.states - (self.gradients if self.passing else 0)

    @property
    def parked(self) -> int:
        """Of `resting`, what stays while optimizer states are parked (`lrscale.parallel.parked_states`)."""
        return self.resting - self.masters - self.moments


@cache
def _sizes(dims: ModelDims, layers: int, kind: str) -> tuple[tuple[int, int], ...]:
    """Elements of the tensors of policy and projector, and how many have so many."""
    return tuple(Counter(t.elements for t in (*model_tensors(dims), *projector_tensors(dims, layers, kind))).items())


def tensor_sizes(recipe: Recipe, dims: ModelDims) -> tuple[tuple[int, int], ...]:
    """Elements of the tensors of policy and projector, and how many have so many."""
    return _sizes(dims, recipe.projector.layers, recipe.projector.kind)


def weight_elements(recipe: Recipe, dims: ModelDims) -> int:
    """Parameters of policy and projector together."""
    return dims.parameters + dims.projector_parameters(recipe.projector.layers, recipe.projector.kind)


def rank_states(recipe: Recipe, dims: ModelDims, ranks: int, zero: ZeroSettings | None = None) -> RankStates:
    """Of a rank that has trained both base and projector.

    ZeRO-3 (arXiv 1910.02054, section 5.3): each of N ranks keeps 1/N of every tensor, rounded up; with Adam 2 bytes
    of weights, 2 or 4 of gradients, 4 of masters and 8 of moments a parameter. float32 weights are their own masters,
    but not with DeepSpeed, which means to spare that copy and compares a device with its name (stage3.py,
    `_create_fp32_partitions`): 20 bytes a parameter.
    """
    parallel, element = recipe.parallel, ELEMENT_BYTES[recipe.model.dtype]
    zero = zero or zero_settings(dims.hidden)
    shares = 1 if parallel.kind == "single" else ranks
    sizes = tensor_sizes(recipe, dims)
    own = sum(count * -(-elements // shares) for elements, count in sizes)
    narrow = element < 4
    zero3 = parallel.kind == "zero3"
    wide_gradients = not narrow or parallel.fp32_gradients or not zero3
    gradients = own * max(element, 4 if wide_gradients else element)
    if narrow and parallel.kind == "fsdp2":
        gradients += own * element  # what a backward pass has reduced, until it is added to those in float32
    masters = own * 4 if narrow or zero3 else 0
    moments = 2 * own * max(element, 4)
    weights = own * element
    offloaded = gradients + masters + moments if parallel.offload_optimizer else 0
    host = int(max(offloaded, 16 * own) * _HOST_FACTOR) if parallel.offload_optimizer else 0
    if parallel.offload_optimizer:
        gradients = masters = moments = 0
    if parallel.offload_parameters:
        host += weights
        weights = 0
    kept = (count * elements for elements, count in sizes if zero3 and elements <= zero.persistence)
    return RankStates(
        weights=weights,
        gradients=gradients,
        masters=masters,
        moments=moments,
        persistent=element * sum(kept),
        buckets=_ENGINES * zero.reduce_bucket * element if zero3 else 0,
        host=host,
        passing=not zero3,
    )
