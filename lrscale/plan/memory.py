"""Memory of one GPU and of one node in every phase of a run, by arithmetic.

N ranks, P parameters, H hidden width, V vocabulary; parts of a phase are there at the same time, phases are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lrscale.config.hardware import Machine, load_machine
from lrscale.config.optimisation import SEEN_BUDGETS
from lrscale.config.recipe import Recipe
from lrscale.plan.layout import Layout, layout_of
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.states import (
    ELEMENT_BYTES,
    RankStates,
    ZeroSettings,
    rank_states,
    tensor_sizes,
    weight_elements,
    zero_settings,
)
from lrscale.plan.topology import longest_sequence

_ACTIVATIONS_PER_TOKEN = 28
"""Elements of width H that one layer keeps for its backward pass: about 28 for Llama-3.1-8B, 24 to 48 by architecture
(34 with GPT-3's MLP: Korthikanti et al., arXiv 2205.05198, equation 2, attention's scores not kept)."""
_GATHER_BUCKET = 256 * 2**20
"""`lrscale.parallel.zero3.GATHER_BYTES`: whole parameters side by side on their way to an engine."""
_FILE_PART = 4 * 2**30
"""`lrscale.parallel.shards.PART_BYTES`: what a rank copies to the host at once to write it."""
_LOGIT_COPIES = 3
"""Logits, their softmax and its gradient, of one chunk."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What is in memory at the height of one phase."""

    name: str
    parts: tuple[tuple[str, float], ...]
    """GiB a GPU, by what they are for."""
    host: float
    """GiB a node."""
    gpus: str = "train"
    """`train` or `rollout`: where nodes are split, whose GPUs."""

    @property
    def total(self) -> float:
        return sum(size for _, size in self.parts)

    def part(self, name: str) -> float:
        """GiB of one part, 0 where the phase has none of it."""
        return dict(self.parts).get(name, 0.0)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All phases of a run, in the order of time."""

    phases: tuple[Phase, ...]
    states: float
    """GiB a GPU of weights, gradients, masters and moments that a training rank keeps."""
    kept_for_backward: float
    """GiB a GPU of an update's activations."""

    @property
    def host_largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.host)

    @property
    def host_per_node(self) -> float:
        """GiB a node at most: while loading, saving, or for what is offloaded."""
        return self.host_largest.host

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> float:
        """GiB a GPU."""
        return self.largest.total

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def memory_plan(
    recipe: Recipe,
    dims: ModelDims,
    layout: Layout | None = None,
    machine: Machine | None = None,
    zero: ZeroSettings | None = None,
) -> MemoryPlan:
    """The memory that a run takes. None: the recipe's own layout, the shipped constants, the shipped DeepSpeed file."""
    needs = _Needs(
        recipe,
        dims,
        layout or layout_of(recipe),
        machine or load_machine(),
        zero or zero_settings(dims.hidden),
    )
    return MemoryPlan(tuple(needs.phases()), _gib(needs.kept.states), _gib(needs.activations))


def whole_copy_gib(recipe: Recipe, dims: ModelDims) -> float:
    """The weights of policy and projector in one piece."""
    return _gib(weight_elements(recipe, dims) * ELEMENT_BYTES[recipe.model.dtype])


def gather(recipe: Recipe, dims: ModelDims) -> str:
    """`parallel.gather` with `auto` decided as the ranks would."""
    parallel = recipe.parallel
    if parallel.gather != "auto":
        return parallel.gather
    return "whole" if whole_copy_gib(recipe, dims) <= parallel.whole_gather_gib else "per_layer"


def cache_positions(recipe: Recipe, dims: ModelDims, layout: Layout, machine: Machine) -> int:
    """Positions that one engine's cache of keys and values holds, latent ones like any others.

    What is left of the memory that the engine may use (vLLM's gpu_memory_utilization) after its weights and
    activations; beside a parked trainer at most what that leaves free. Its GPUs share heads, so the cache grows with
    them; more GPUs than heads of keys and values hold copies.
    """
    needs = _Needs(recipe, dims, layout, machine, zero_settings(dims.hidden))
    shared = min(layout.tensor_parallel, dims.kv_heads)
    a_position = dims.kv_bytes_per_token(needs.element) / shared
    return max(0, int(needs.cache_bytes / a_position))


@dataclass(frozen=True, slots=True)
class _Needs:
    """What the formulas read. Sizes are bytes."""

    recipe: Recipe
    dims: ModelDims
    layout: Layout
    machine: Machine
    zero: ZeroSettings

    @property
    def element(self) -> int:
        return ELEMENT_BYTES[self.recipe.model.dtype]

    @property
    def kept(self) -> RankStates:
        return rank_states(self.recipe, self.dims, self.layout.train_gpus, self.zero)

    @property
    def sharded(self) -> bool:
        return self.recipe.parallel.kind != "single"

    @property
    def tokens(self) -> int:
        """Positions of the largest micro-batch: at least one row."""
        return max(self.recipe.optimisation.micro_batch_tokens, longest_sequence(self.recipe))

    @property
    def live(self) -> int:
        """Weights of other ranks, gathered for the layers at work: DeepSpeed's window, what it prefetches, a layer."""
        if not self.sharded:
            return 0
        window = min(self.zero.max_live + self.zero.prefetch, weight_elements(self.recipe, self.dims))
        return self.element * (window + self.dims.layer_parameters)

    @property
    def activations(self) -> int:
        """One layer's input for each and one layer in full with checkpointing, else all in full (Chen et al., arXiv
        1604.06174)."""
        layers = self.dims.layers
        full = _ACTIVATIONS_PER_TOKEN
        kept = layers + full if self.recipe.model.gradient_checkpointing else layers * full
        return self.element * self.tokens * self.dims.hidden * kept

    @property
    def expanded(self) -> int:
        """Activations of `lrscale.latent.expand` with gradients: keys and values of all positions, in pieces, and what
        the text behind a row's first latent keeps; nothing before it depends on the projector.

        With checkpointing each layer keeps its input there, and one layer of one stretch of text is recomputed at once.
        """
        dims = self.dims
        rows = max(1, self.tokens // longest_sequence(self.recipe))
        behind = rows * self.recipe.rollout.max_new_tokens
        kept = behind * dims.layers * _ACTIVATIONS_PER_TOKEN
        if self.recipe.model.gradient_checkpointing:
            kept = (
                behind * dims.layers
                + behind // (round(self.machine.sequences.markers_a_trace.value) + 1) * _ACTIVATIONS_PER_TOKEN
            )
        full = self.element * dims.hidden * kept
        return self.tokens * dims.kv_bytes_per_token(self.element) + full + self.element * behind * dims.hidden

    @property
    def sharing(self) -> int:
        """What an update takes more where samples share a prompt: another gradient, since weights are used twice before
        one is whole; and keys and values copied to each row and to each head that reads them, with their gradients.
        Those of one layer with checkpointing, else of all."""
        if not self.recipe.shares_prompts:
            return 0
        layers = 1 if self.recipe.model.gradient_checkpointing else self.dims.layers
        copied = 2 * SEEN_BUDGETS * self.tokens * self.dims.heads * self.dims.head_dim * self.element
        return self.element * weight_elements(self.recipe, self.dims) + copied * (layers + 1)

    @property
    def logits(self) -> int:
        """Of one chunk of the LM head (model.logits_mib, counted in float32)."""
        whole = 4 * self.tokens * self.dims.vocabulary
        return _LOGIT_COPIES * min(self.recipe.model.logits_mib * 2**20, whole)

    @property
    def latents(self) -> int:
        """Recorded latents of a micro-batch, put back in as inputs."""
        return round(self.machine.sequences.latent_share.value * self.tokens) * self.dims.hidden * self.element

    @property
    def step(self) -> int:
        """Gradients of a sub-group in float32 while the optimizer steps (stage3.py, `_prepare_fp32_grad_for_sub_group`)."""
        if not self.sharded or self.recipe.parallel.offload_optimizer:
            return 0
        return 4 * min(self.zero.sub_group, weight_elements(self.recipe, self.dims) // self.layout.train_gpus)

    @property
    def beside_engine(self) -> int:
        """What the trainer keeps on the device while sequences are decoded there."""
        if not self.layout.colocated:
            return 0
        kept = self.kept
        states = kept.parked if self.recipe.parallel.offload_between_phases else kept.resting
        return states + kept.persistent + kept.buckets

    @property
    def engine_weights(self) -> int:
        """A copy of its own, shared by the GPUs of an engine; local decoding copies the weights only where they fit."""
        whole = self.element * weight_elements(self.recipe, self.dims)
        if self.layout.engine == "vllm":
            return whole // self.layout.tensor_parallel
        return whole if self.sharded and gather(self.recipe, self.dims) == "whole" else 0

    @property
    def engine_activations(self) -> int:
        if self.layout.engine == "vllm":
            return _bytes(self.machine.overheads.engine_gib.value)
        return self.live if not self.engine_weights else 0

    @property
    def engine_share(self) -> float:
        """Of a GPU's memory, that an engine takes at its start."""
        rollout, overheads = self.recipe.rollout, self.machine.overheads
        if rollout.kind == "vllm" and (rollout.placement == "colocated") == self.layout.colocated:
            return rollout.engine_memory_share
        usual = overheads.engine_colocated_share if self.layout.colocated else overheads.engine_memory_share
        return usual.value

    @property
    def cache_bytes(self) -> float:
        """Of keys and values on one GPU, at most."""
        memory = _bytes(self.recipe.cluster.gpu_memory_gib)
        fixed = self.engine_weights + self.engine_activations
        free = memory - self.beside_engine - fixed - _bytes(self.machine.overheads.fragmentation_gib.value)
        return free if self.layout.engine == "local" else min(free, memory * self.engine_share - fixed)

    @property
    def cache(self) -> float:
        """What rollout takes for keys and values on one GPU: local decoding for all its sequences at their longest, an
        engine all that its share of the memory leaves, needed or not (vLLM's gpu_memory_utilization)."""
        shared = min(self.layout.tensor_parallel, self.dims.kv_heads)
        row = longest_sequence(self.recipe) * self.dims.kv_bytes_per_token(self.element) / shared
        if self.layout.engine == "local":
            rl, rows = self.recipe.stages.rl, self.recipe.rollout.batch_rows
            return row * min(rows, -(-rl.prompts_per_step * rl.group_size // self.layout.engines))
        memory = _bytes(self.recipe.cluster.gpu_memory_gib)
        return max(row, memory * self.engine_share - self.engine_weights - self.engine_activations)

    def phases(self) -> Iterator[Phase]:
        """In the order in which a run gets to them."""
        kept = self.kept
        largest = max(elements for elements, _ in tensor_sizes(self.recipe, self.dims)) * self.element
        block = self.dims.projector_parameters(1) * self.element
        base = {"states": kept.resting, "persistent": kept.persistent, "buckets": kept.buckets}
        weights = {"states": kept.resting, "persistent": kept.persistent, "whole tensors": max(largest, block)}
        yield self._phase("load", weights, host=self._loading(block))
        share = self.dims.projector_parameters(self.recipe.projector.layers) / weight_elements(self.recipe, self.dims)
        graded = kept.resting + (kept.gradients * share if kept.passing else 0)
        expanding = {"states": graded, "live": self.live, "activations": self.expanded, "logits": self.logits}
        yield self._phase("projector SFT", base | expanding)
        yield self._rollout()
        forward = self.element * self.tokens * self.dims.hidden * _ACTIVATIONS_PER_TOKEN
        yield self._phase(
            "log-probs",
            base | {"live": self.live, "activations": forward, "logits": self.logits, "latents": self.latents},
        )
        training = {"live": self.live, "activations": self.activations, "logits": self.logits, "latents": self.latents}
        training |= {"states": kept.states} | ({"shared prompts": self.sharing} if self.sharing else {})
        yield self._phase(
            "update",
            base | max(training, {"states": kept.states, "optimizer step": self.step}, key=lambda p: sum(p.values())),
        )
        bucket = max(min(_GATHER_BUCKET, self.element * weight_elements(self.recipe, self.dims)), largest)
        copied = self.engine_weights if self.layout.colocated else 0
        resident = {"states": self.beside_engine - kept.persistent - kept.buckets} if self.layout.colocated else {}
        yield self._phase("publish", base | resident | {"gathered bucket": bucket, "engine weights": copied})
        written = kept.states + (kept.host if self.recipe.parallel.offload_optimizer else 0)
        saving = self.layout.gpus_per_node * min(_FILE_PART, written)
        yield self._phase("checkpoint", base, host=saving)

    def _rollout(self) -> Phase:
        parts: dict[str, float] = {}
        kept, parked = self.kept, 0
        if self.layout.colocated:
            states = self.beside_engine - kept.persistent - kept.buckets
            parts = {"states": states, "persistent": kept.persistent, "buckets": kept.buckets}
            parked = (kept.resting - states) * self.layout.gpus_per_node
        name = "engine activations" if self.layout.engine == "vllm" else "live"
        parts |= {"engine weights": self.engine_weights, name: self.engine_activations, "cache": self.cache}
        gpus = "train" if self.layout.colocated else "rollout"
        return self._phase("rollout", parts, host=parked, gpus=gpus)

    def _loading(self, block: int) -> float:
        """Each rank reads its part of every tensor, and of the projector a whole MLP tensor at a time."""
        return self.layout.gpus_per_node * (
            self.element * weight_elements(self.recipe, self.dims) / self._ranks + block / 3
        )

    @property
    def _ranks(self) -> int:
        return self.layout.train_gpus if self.sharded else 1

    def _phase(self, name: str, parts: Mapping[str, float], *, host: float = 0.0, gpus: str = "train") -> Phase:
        host += self.kept.host * self.layout.gpus_per_node if gpus == "train" else 0
        allowance = self.machine.overheads.fragmentation_gib.value
        sizes = ((part, _gib(size)) for part, size in parts.items() if size)
        return Phase(name, (*sizes, ("allowance", allowance)), _gib(host), gpus)


def _bytes(gib: float) -> int:
    return int(gib * 2**30)


def _gib(count: float) -> float:
    return count / 2**30
