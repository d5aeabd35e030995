"""Memory of one GPU and of one node in every phase of a run, by arithmetic.

N ranks, P parameters, H hidden width, V vocabulary; parts of a phase are there at the same time, phases are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lrscale.config.hardware import Machine, load_machine
from lrscale.config.optimisation import SEEN_BUDGETS
from lrscale.config.recipe import Recipe
from lrscale.plan.activations import forward_bytes, input_bytes, kept_bytes, passing_bytes, recomputed_bytes
from lrscale.plan.gathering import gather
from lrscale.plan.layout import Layout, layout_of
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.phases import MemoryPlan, Phase
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
from lrscale.plan.workload import markers_of_a_trace

_GATHER_BUCKET = 256 * 2**20
"""`lrscale.parallel.zero3.GATHER_BYTES`: whole parameters side by side on their way to an engine."""
_FILE_PART = 4 * 2**30
"""`lrscale.parallel.shards.PART_BYTES`: what a rank copies to the host at once to write it."""
_LOGIT_COPIES = 4
"""Of one chunk in its backward pass: scaled logits, their softmax, and the gradients of both terms of a log-prob."""


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
    return MemoryPlan(tuple(needs.phases()), _gib(needs.kept.states), _gib(needs.kept_for_backward + needs.recomputing))


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
    def zero3(self) -> bool:
        return self.recipe.parallel.kind == "zero3"

    @property
    def projector(self) -> int:
        projector = self.recipe.projector
        return self.element * self.dims.projector_parameters(projector.layers, projector.kind)

    @property
    def tokens(self) -> int:
        """Positions of the largest micro-batch: at least one row."""
        return max(self.recipe.optimisation.micro_batch_tokens, longest_sequence(self.recipe))

    @property
    def whole(self) -> int:
        """Of policy and projector in one piece."""
        return self.element * weight_elements(self.recipe, self.dims)

    @property
    def largest_tensor(self) -> int:
        return self.element * max(elements for elements, _ in tensor_sizes(self.recipe, self.dims))

    @property
    def unit(self) -> int:
        """What is gathered at once: a layer, the embedding or the head, the largest of them."""
        return max(self.element * self.dims.layer_parameters, self.largest_tensor)

    @property
    def live(self) -> int:
        """Weights of other ranks, gathered for what is at work.

        At most DeepSpeed's window, what it prefetches, and the unit at work. FSDP2 holds that unit and the next one.
        """
        if not self.sharded:
            return 0
        window = self.element * (self.zero.max_live + self.zero.prefetch) if self.zero3 else self.unit
        return min(self.whole, window + self.unit)

    @property
    def live_expanding(self) -> int:
        """The same in projector SFT under ZeRO-3: a frozen base whose layers run several times is released when the
        backward pass is through, and without checkpointing nothing is before; the projector likewise."""
        if not self.zero3:
            return self.live
        if not self.recipe.model.gradient_checkpointing:
            return self.whole
        return min(self.whole, max(self.live, self.projector + 2 * self.unit))

    @property
    def whole_gradients(self) -> int:
        """Of tensors that are not reduced yet, in the backward pass: the head's, summed over its chunks, and that of
        the newest one. FSDP2 sends them in float32 (`reduce_dtype`), ZeRO-3 where `fp32_gradients` asks."""
        head = self.element * self.dims.vocabulary * self.dims.hidden
        if not self.sharded:
            return 2 * head
        wide = self.recipe.parallel.fp32_gradients or not self.zero3
        return 2 * head + (4 * self.largest_tensor // self.element if wide and self.element < 4 else 0)

    @property
    def reference(self) -> int:
        """The frozen policy that a KL term compares with, sharded like the policy; it stays from RL's start."""
        if not self.recipe.stages.rl.kl.coefficient:
            return 0
        return self.kept.weights + self.kept.persistent

    @property
    def forward(self) -> int:
        """A forward without gradients: the MLP's halves and their product, the residual and what attention reads."""
        return self.tokens * forward_bytes(self.dims, self.element)

    @property
    def kept_for_backward(self) -> int:
        """Every layer's input with checkpointing, else all that layers keep."""
        kept = input_bytes if self.recipe.model.gradient_checkpointing else kept_bytes
        return self.tokens * kept(self.dims, self.element)

    @property
    def recomputing(self) -> int:
        """One layer of it in the backward pass: recomputed in full with checkpointing, and its gradients."""
        full = recomputed_bytes(self.dims, self.element) if self.recipe.model.gradient_checkpointing else 0
        return self.tokens * (full + passing_bytes(self.dims, self.element))

    @property
    def markers(self) -> int:
        """Of the longest trace."""
        return round(markers_of_a_trace(self.recipe, self.machine, self.recipe.rollout.max_new_tokens))

    @property
    def expanded(self) -> int:
        """Activations of `lrscale.latent.expand` with gradients: keys and values of all positions, in pieces, and what
        the text behind a row's first latent keeps; nothing before it depends on the projector.

        With checkpointing each layer keeps its input there, and one layer of one stretch of text is recomputed at once.
        """
        dims, markers = self.dims, self.markers
        longest = longest_sequence(self.recipe)
        rows = max(1, self.tokens // longest)
        behind = rows * self.recipe.rollout.max_new_tokens
        if self.recipe.model.gradient_checkpointing:
            a_layer = recomputed_bytes(dims, self.element) + passing_bytes(dims, self.element)
            kept = behind * input_bytes(dims, self.element) + behind // (markers + 1) * a_layer
        else:
            # Each feed keeps the keys and values before it, joined and repeated for all heads: half of them on average.
            feeds = markers * (self.recipe.stages.traces.max_steps + 1)
            joined = 2 * dims.heads * dims.head_dim * self.element * dims.layers
            kept = behind * kept_bytes(dims, self.element) + feeds * rows * longest // 2 * joined
        return self.tokens * dims.kv_bytes_per_token(self.element) + kept + self.element * behind * dims.hidden

    @property
    def sharing(self) -> int:
        """What an update takes more where samples share a prompt: another gradient, since weights are used twice before
        one is whole; and keys and values copied to each row and to each head that reads them, with their gradients.
        Those of one layer with checkpointing, else of all."""
        if not self.recipe.shares_prompts:
            return 0
        layers = 1 if self.recipe.model.gradient_checkpointing else self.dims.layers
        copied = 2 * SEEN_BUDGETS * self.tokens * self.dims.heads * self.dims.head_dim * self.element
        return self.whole + copied * (layers + 1)

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
        """Gradients of a sub-group while DeepSpeed's optimizer steps, flat and in float32 (stage3.py,
        `_prepare_fp32_grad_for_sub_group`)."""
        if not self.zero3 or self.recipe.parallel.offload_optimizer:
            return 0
        flat = self.element if self.element < 4 and not self.recipe.parallel.fp32_gradients else 4
        own = weight_elements(self.recipe, self.dims) // self.layout.train_gpus
        return (flat + 4) * min(self.zero.sub_group, own)

    @property
    def update(self) -> dict[str, float]:
        """The tallest moment of an update: in the head's backward pass, in a layer's, or in the optimizer step."""
        always = {"live": self.live, "latents": self.latents}
        if self.sharing:
            always["shared prompts"] = self.sharing
        moments: tuple[dict[str, float], ...] = (
            {"activations": self.kept_for_backward, "logits": self.logits, "whole gradients": self.whole_gradients},
            {"activations": self.kept_for_backward + self.recomputing},
        )
        running = max((always | moment for moment in moments), key=lambda parts: sum(parts.values()))
        return max(running, {"optimizer step": self.step}, key=lambda parts: sum(parts.values()))

    @property
    def resident(self) -> int:
        """States that stay on the device while sequences are decoded there."""
        return self.kept.parked if self.recipe.parallel.offload_between_phases else self.kept.resting

    @property
    def parked(self) -> int:
        """The others, on the host of a node."""
        return (self.kept.resting - self.resident) * self.layout.gpus_per_node

    @property
    def beside_engine(self) -> int:
        """All that the trainer keeps on the device then."""
        if not self.layout.colocated:
            return 0
        return self.resident + self.kept.persistent + self.kept.buckets + self.reference

    @property
    def engine_weights(self) -> int:
        """A copy of its own, shared by the GPUs of an engine; local decoding copies the weights only where they fit."""
        if self.layout.engine == "vllm":
            return self.whole // self.layout.tensor_parallel
        return self.whole if self.sharded and gather(self.recipe, self.dims) == "whole" else 0

    @property
    def engine_activations(self) -> int:
        """Of local decoding: all different prompts of a batch in one forward, or one layer's keys and values repeated for
        all heads, and logits; where it decodes on shards, the gathered weights."""
        if self.layout.engine == "vllm":
            return _bytes(self.machine.overheads.engine_gib.value)
        dims, rows = self.dims, self.rows
        different = -(-rows // self.recipe.stages.rl.group_size)
        prompts = different * (longest_sequence(self.recipe) - self.recipe.rollout.max_new_tokens)
        repeated = rows * longest_sequence(self.recipe) * 2 * dims.heads * dims.head_dim * self.element
        decoding = repeated + _LOGIT_COPIES * 4 * rows * dims.vocabulary
        return max(prompts * forward_bytes(dims, self.element), decoding) + (0 if self.engine_weights else self.live)

    @property
    def rows(self) -> int:
        """Sequences that a process decodes at once at most (the local engine)."""
        rl = self.recipe.stages.rl
        return min(self.recipe.rollout.batch_rows, -(-rl.prompts_per_step * rl.group_size // self.layout.engines))

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
            return row * self.rows
        memory = _bytes(self.recipe.cluster.gpu_memory_gib)
        return max(row, memory * self.engine_share - self.engine_weights - self.engine_activations)

    def phases(self) -> Iterator[Phase]:
        """In the order in which a run gets to them."""
        kept, parallel = self.kept, self.recipe.parallel
        block = self.dims.projector_parameters(1) * self.element
        before_rl = {"states": kept.resting, "persistent": kept.persistent, "buckets": kept.buckets}
        base = before_rl | {"reference": self.reference}
        weights = {
            "states": kept.resting,
            "persistent": kept.persistent,
            "whole tensors": max(self.largest_tensor, block),
        }
        yield self._phase("load", weights, host=self._loading(block))
        share = self.projector / self.whole
        graded = kept.resting + (kept.gradients * share if kept.passing else 0)
        expanding = {"states": graded, "live": self.live_expanding, "activations": self.expanded, "logits": self.logits}
        yield self._phase("projector SFT", before_rl | expanding)
        yield self._rollout()
        moments = ({"activations": self.forward, "latents": self.latents}, {"logits": self.logits})
        yield self._phase("log-probs", base | {"live": self.live} | max(moments, key=lambda parts: sum(parts.values())))
        yield self._phase("update", base | {"states": kept.states} | self.update)
        yield self._publish(base)
        written = kept.states + (kept.host if parallel.offload_optimizer else 0)
        part = min(_FILE_PART, written)
        copied = {"offloaded part": min(_FILE_PART, kept.host)} if parallel.offload_optimizer else {}
        yield self._phase("checkpoint", base | copied, host=self.layout.gpus_per_node * part)

    def _publish(self, base: Mapping[str, float]) -> Phase:
        """Whole tensors on their way to the engines; files of all of them lie in the node's shared memory until every
        engine has read them (`lrscale.rollout.weight_files`), beside what is parked."""
        host = 0.0
        bucket = max(min(_GATHER_BUCKET, self.whole), self.largest_tensor)
        resident: dict[str, float] = {}
        if self.layout.colocated:
            resident = {"states": self.resident}
            host = self.parked
            if self.layout.engine == "vllm":
                host += self.whole
        copied = self.engine_weights if self.layout.colocated else 0
        return self._phase(
            "publish", {**base, **resident, "gathered bucket": bucket, "engine weights": copied}, host=host
        )

    def _rollout(self) -> Phase:
        parts: dict[str, float] = {}
        kept, parked = self.kept, 0.0
        if self.layout.colocated:
            parts = {"states": self.resident, "persistent": kept.persistent, "buckets": kept.buckets}
            parts |= {"reference": self.reference}
            parked = self.parked
        parts |= {"engine weights": self.engine_weights, "engine activations": self.engine_activations}
        gpus = "train" if self.layout.colocated else "rollout"
        return self._phase("rollout", parts | {"cache": self.cache}, host=parked, gpus=gpus)

    def _loading(self, block: int) -> float:
        """Each rank reads its part of every tensor, and of the projector a whole MLP tensor at a time."""
        return self.layout.gpus_per_node * (self.whole * (2 if self.reference else 1) / self._ranks + block / 3)

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
