"""Memory of one GPU, and of a node while the model is loaded, by arithmetic.

N ranks, P parameters, element sizes in bytes; transient parts of training and of decoding are not there together.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrscale.config.recipe import Recipe
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.topology import longest_sequence, topology

_ADAM = 8
_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
_ACTIVATIONS_PER_TOKEN = 28
"""Elements of width H that one layer keeps for its backward pass: about 28 for Llama-3.1-8B, 24 to 48 by architecture."""
_SUB_GROUP = 10**9
_MAX_LIVE = 10**9
"""DeepSpeed's defaults, which the files of ds_configs/ keep."""
_ALLOWANCE_GIB = 3.0
"""CUDA context, NCCL, fragmentation: 2 to 4 GiB."""
_OFFLOAD_BYTES = 24
"""Host bytes a parameter of an offloaded optimizer: 16, and half as much again for buffers."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """In GiB a GPU, and a node where the name says so."""

    states: float
    """Weights, gradients, masters and moments that this rank keeps."""
    buckets: float
    live: float
    """Weights of other ranks, gathered for the layers at work."""
    activations: float
    logits: float
    """The LM head runs in chunks (model.logits_mib): logits, their softmax and its gradient."""
    optimizer_step: float
    decode: float
    """Keys and values of the sequences decoded side by side, each as long as it may become, and a whole copy."""
    host_per_node: float
    """While loading, and for what is offloaded."""

    @property
    def peak(self) -> float:
        training = max(self.live + self.activations + self.logits, self.optimizer_step)
        return self.states + self.buckets + max(training, self.live + self.decode) + _ALLOWANCE_GIB


def memory_plan(recipe: Recipe, dims: ModelDims) -> MemoryPlan:
    """The memory that a run takes."""
    parallel, there = recipe.parallel, topology(recipe)
    element = _ELEMENT_BYTES[recipe.model.dtype]
    weights = dims.parameters + dims.projector_parameters(recipe.projector.layers)
    sharded = parallel.kind != "single"
    own = weights / (there.world_size if sharded else 1)
    gradient = 4 if parallel.fp32_gradients or element == 4 else element
    optimizer = 0 if parallel.offload_optimizer else gradient + (4 if element == 2 else 0) + _ADAM
    bucket = dims.hidden**2
    layer = dims.layer_parameters
    tokens = max(recipe.optimisation.micro_batch_tokens, longest_sequence(recipe))
    copy = whole_copy_gib(recipe, dims) if sharded and gather(recipe, dims) == "whole" else 0.0
    offloaded = _OFFLOAD_BYTES * own * there.ranks_per_node if parallel.offload_optimizer else 0.0
    return MemoryPlan(
        states=_gib(own * ((0 if parallel.offload_parameters else element) + optimizer)),
        buckets=_gib(2 * bucket * element) if sharded else 0.0,
        live=_gib(element * (min(_MAX_LIVE + bucket * 9 // 10, weights) + layer)) if sharded else 0.0,
        activations=_gib(element * tokens * dims.hidden * _kept_per_token(recipe, dims)),
        logits=3 * recipe.model.logits_mib / 1024,
        optimizer_step=0.0 if parallel.offload_optimizer else _gib(4 * min(_SUB_GROUP, own)),
        decode=copy + _gib(_decoded_rows(recipe) * longest_sequence(recipe) * dims.kv_bytes_per_token(element)),
        host_per_node=_gib(element * own * there.ranks_per_node + offloaded),
    )


def whole_copy_gib(recipe: Recipe, dims: ModelDims) -> float:
    """The weights of policy and projector in one piece."""
    weights = dims.parameters + dims.projector_parameters(recipe.projector.layers)
    return _gib(weights * _ELEMENT_BYTES[recipe.model.dtype])


def gather(recipe: Recipe, dims: ModelDims) -> str:
    """`parallel.gather` with `auto` decided as the ranks would."""
    parallel = recipe.parallel
    if parallel.gather != "auto":
        return parallel.gather
    return "whole" if whole_copy_gib(recipe, dims) <= parallel.whole_gather_gib else "per_layer"


def _kept_per_token(recipe: Recipe, dims: ModelDims) -> int:
    """Elements of width H: one layer's input for each, and one layer in full, with checkpointing; else all in full."""
    if recipe.model.gradient_checkpointing:
        return dims.layers + _ACTIVATIONS_PER_TOKEN
    return dims.layers * _ACTIVATIONS_PER_TOKEN


def _decoded_rows(recipe: Recipe) -> int:
    rl = recipe.stages.rl
    of_rank = -(-rl.prompts_per_step * rl.group_size // topology(recipe).world_size)
    return min(recipe.rollout.batch_rows, of_rank)


def _gib(count: float) -> float:
    return count / 2**30
