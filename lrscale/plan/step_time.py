"""How long the parts of an RL step take, by a roofline: work over peak times efficiency, whichever limit is nearer.

`step_model` turns recipe, model, layout and machine into a handful of rates; simulations work with these alone, and
may be given measured ones instead.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lrscale.config.hardware import Machine
from lrscale.config.recipe import Recipe
from lrscale.plan.checkpoint_bytes import checkpoint_bytes
from lrscale.plan.collectives import all_reduce_s, gather_s
from lrscale.plan.flops import Flops, flops, projector_flops
from lrscale.plan.layout import Layout, require_layout
from lrscale.plan.memory import cache_positions, gather
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.states import ELEMENT_BYTES, weight_elements
from lrscale.plan.workload import Workload, scoring_workers, workload

_OPTIMIZER_TRAFFIC = 28
"""Bytes that a fused AdamW step reads and writes a parameter: gradient 2, master, two moments in and out 24, weight 2."""
_ROWS_OF_A_SUM = 64
"""Rows of the sums between an engine's GPUs: their start-up counts, hardly their size."""


@dataclass(frozen=True, slots=True)
class StepModel:
    """Rates of one run on one layout. Times in seconds, lengths in positions (tokens and latents)."""

    engines: int
    """That decode side by side, each with its share of the sequences."""
    gpus_per_engine: int
    prefill_positions_per_s: float
    """Of one engine."""
    shared_prefill: bool
    """Whether an engine computes the prompt of a group once (prefix caching)."""
    refills: bool
    """Whether a place that becomes free is taken by the next sequence at once."""
    step_s: float
    """Of a decoding step whatever it holds: scheduling, kernels, collectives between the engine's GPUs."""
    weights_s: float
    """To read the weights that every decoding step needs."""
    experts_s: float
    """To read all experts of a mixture; 0 for dense models."""
    expert_share: float
    """Chance that one token needs a given expert."""
    projector_s: float
    """To read the projector, in steps in which some sequence is at a latent position."""
    position_s: float
    """To read keys and values of one cached position."""
    row_s: float
    """To compute one position, the limit of large batches."""
    cache_positions: int
    """Positions that an engine's cache holds."""
    batch_limit: int
    """Sequences that an engine decodes at once at most, whatever the cache holds."""
    logprob_s: float
    """A position of one pass of log-probs over all training ranks together."""
    update_s: float
    """A position of the update, all training ranks together, collectives that do not hide included."""
    optimizer_s: float
    """An optimizer step."""
    publish_s: float
    """New weights into every engine."""
    projector_publish_s: float
    """The projector alone, after a refresh."""
    refresh_s: float
    """One refresh of the projector."""
    checkpoint_s: float
    """A checkpoint, during which nothing else happens."""
    load_s: float
    """The model from disk into trainer and engines."""
    start_s: float
    """From the job's start until weights can be read: imports, process groups, the engines' own start."""
    scoring_workers: int
    colocated: bool
    one_step_off: bool

    def decode_step_s(self, batch: float, context: float, latent_share: float = 0.0) -> float:
        """One more position for each of `batch` sequences of one engine, with `context` cached positions each.

        Bound by what is read from memory (weights once for the batch, each sequence's cache) or by products,
        whichever takes longer (Pope et al., arXiv 2211.05102, section 2).
        """
        if batch <= 0:
            return 0.0
        touched = 1 - math.pow(1 - self.expert_share, batch) if self.experts_s else 0.0
        projected = 1 - math.pow(1 - latent_share, batch)
        read_s = self.weights_s + touched * self.experts_s + projected * self.projector_s
        read_s += batch * context * self.position_s
        return self.step_s + max(read_s, batch * self.row_s)

    def max_batch(self, positions: float) -> int:
        """Sequences of so many positions that an engine decodes at once."""
        return max(1, min(self.batch_limit, int(self.cache_positions // max(1.0, positions))))

    def prefill_s(self, positions: float) -> float:
        """Prompts of so many positions in all, on one engine."""
        return positions / self.prefill_positions_per_s

    def rollout_s(
        self, prompts: int, group: int, prompt_tokens: float, lengths: Sequence[int], latents: float
    ) -> float:
        """Until the last of `prompts` x `group` sequences has ended; `lengths` are those of all completions.

        That of the engine with the longest sequence. Engines that refill their places go on as soon as one is free
        (continuous batching: Orca, OSDI 2022), others when all of a batch have ended. `latents` is the share of latent
        positions.
        """
        mine = sorted(lengths)[:: -max(1, self.engines)]  # the longest, and every so many-th below it
        order = [mine[index] for index in _strided(len(mine))]
        share = -(-prompts * (1 if self.shared_prefill else group) // self.engines)
        places = self.max_batch(prompt_tokens + sum(order) / max(1, len(order)))
        batches = [order] if self.refills else [order[at : at + places] for at in range(0, len(order), places)]
        decoding_s = (self._decoded_s(batch, places, prompt_tokens, latents) for batch in batches)
        return self.prefill_s(share * prompt_tokens) + sum(decoding_s)

    def _decoded_s(self, lengths: Sequence[int], places: int, prompt_tokens: float, latents: float) -> float:
        """Until all have ended, at most `places` side by side; from one ending to the next the batch stays as it is."""
        running = [(length, 0) for length in lengths[:places]]  # the steps at which each ends, and began
        heapq.heapify(running)
        waiting = iter(lengths[places:])
        seconds, step, began = 0.0, 0, 0
        while running:
            ending = running[0][0]
            context = prompt_tokens + (step + ending) / 2 - began / len(running)
            seconds += (ending - step) * self.decode_step_s(len(running), context, latents)
            step = ending
            while running and running[0][0] == step:
                began -= heapq.heappop(running)[1]
                follower = next(waiting, None)
                if follower is not None:
                    heapq.heappush(running, (step + follower, step))
                    began += step
        return seconds


def step_model(
    recipe: Recipe, dims: ModelDims, layout: Layout, machine: Machine, *, work: Workload | None = None
) -> StepModel:
    """The rates of a recipe on a layout.

    Raises:
        LayoutError: the layout is impossible for this model.
    """
    require_layout(layout, dims)
    job = _Job(recipe, dims, layout, machine, work or workload(recipe, machine))
    load_s = job.bytes / 2**30 / (recipe.cluster.read_gib_s * layout.train_nodes)
    if layout.engine == "vllm":
        load_s = max(load_s, job.bytes / 2**30 / recipe.cluster.read_gib_s)  # every node of engines reads all of it
    rate, experts = job.memory_rate * layout.tensor_parallel, dims.experts
    return StepModel(
        engines=layout.engines,
        gpus_per_engine=layout.tensor_parallel,
        prefill_positions_per_s=job.computing_rate / job.products,
        shared_prefill=layout.engine == "vllm",
        refills=layout.engine == "vllm",
        step_s=job.step_s,
        weights_s=(job.bytes - job.projector_bytes - job.experts_bytes) / rate,
        experts_s=job.experts_bytes / rate,
        expert_share=experts.active / experts.count if experts else 0.0,
        projector_s=job.projector_bytes / rate,
        position_s=dims.kv_bytes_per_token(job.element) / rate,
        row_s=job.products / job.computing_rate,
        cache_positions=cache_positions(recipe, dims, layout, machine),
        batch_limit=recipe.rollout.batch_rows,
        logprob_s=job.logprob_s,
        update_s=job.update_s,
        optimizer_s=job.optimizer_s,
        publish_s=job.publish_s(job.bytes),
        projector_publish_s=job.publish_s(job.projector_bytes),
        refresh_s=job.refresh_s,
        checkpoint_s=job.checkpoint_s,
        load_s=load_s,
        start_s=machine.overheads.start_s.value
        + (machine.overheads.engine_start_s.value if layout.engine == "vllm" else 0.0),
        scoring_workers=scoring_workers(recipe, layout.train_gpus),
        colocated=layout.colocated,
        one_step_off=layout.one_step_off,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """What the formulas read."""

    recipe: Recipe
    dims: ModelDims
    layout: Layout
    machine: Machine
    work: Workload

    @property
    def element(self) -> int:
        return ELEMENT_BYTES[self.recipe.model.dtype]

    @property
    def bytes(self) -> float:
        """Of policy and projector."""
        return float(self.element * weight_elements(self.recipe, self.dims))

    @property
    def projector_bytes(self) -> float:
        projector = self.recipe.projector
        return float(self.element * self.dims.projector_parameters(projector.layers, projector.kind))

    @property
    def peak(self) -> float:
        """Floating point operations a second of one GPU. float32 and wider take the same units at half speed or less."""
        return self.machine.gpu.bf16_tflops * 1e12 * min(1.0, 2 / self.element)

    @property
    def memory_rate(self) -> float:
        """Bytes a second that decoding reads."""
        return self.machine.gpu.memory_tb_s * 1e12 * self.machine.efficiencies.decode_bandwidth.value

    @property
    def per_layer(self) -> bool:
        """Whether local decoding gathers every layer's weights at every step."""
        sharded = self.recipe.parallel.kind != "single" and self.layout.train_gpus > 1
        return self.layout.engine == "local" and sharded and gather(self.recipe, self.dims) == "per_layer"

    def gathered_s(self, size: float, messages: int) -> float:
        layout = self.layout
        if self.recipe.parallel.kind == "single":
            return 0.0
        return gather_s(
            self.machine, size, nodes=layout.train_nodes, gpus_per_node=layout.gpus_per_node, messages=messages
        )

    @property
    def experts_bytes(self) -> float:
        """Of all experts of a mixture; 0 for dense models."""
        experts, idle = self.dims.experts, self.dims.parameters - self.dims.active_parameters
        return self.element * idle * experts.count / (experts.count - experts.active) if experts and idle else 0.0

    @property
    def step_s(self) -> float:
        """Of a decoding step whatever it holds: the program around it, and collectives of two sums a layer where an
        engine spans several GPUs (Megatron-LM, arXiv 1909.08053, section 3), or of all weights where it spans none."""
        dims, layout, overheads = self.dims, self.layout, self.machine.overheads
        rows = min(self.recipe.rollout.batch_rows, _ROWS_OF_A_SUM)
        summed_s = all_reduce_s(self.machine, rows * dims.hidden * self.element, layout.tensor_parallel)
        if layout.engine == "vllm":
            return overheads.decode_step_ms.value * 1e-3 + 2 * dims.layers * summed_s
        moved_s = self.gathered_s(self.bytes - self.projector_bytes, dims.layers) if self.per_layer else 0.0
        return dims.layers * overheads.eager_layer_us.value * 1e-6 + moved_s

    @property
    def products(self) -> float:
        """Operations of a position, forward."""
        return flops(self.dims, self._mean, causal=True).forward / self._mean

    @property
    def computing_rate(self) -> float:
        """Operations a second of an engine."""
        return self.peak * self.layout.tensor_parallel * self.machine.efficiencies.prefill.value

    @property
    def logprob_s(self) -> float:
        work = (self._row.forward - self.work.spared * self._prompt.forward) / self._mean
        computing_s = work / (self.peak * self.machine.efficiencies.prefill.value * self.layout.train_gpus)
        return self._beside(computing_s, self._gathers_s(1) / max(1.0, self.work.positions))

    @property
    def update_s(self) -> float:
        """Products over the training ranks; each micro-batch gathers the weights for forward and backward, and
        reduces gradients once (ZeRO, arXiv 1910.02054, section 7.2: 3 x the parameters a step, here a micro-batch)."""
        checkpointing = self.recipe.model.gradient_checkpointing
        row, prompt = (one.training(checkpointing=checkpointing) for one in (self._row, self._prompt))
        work = (row - self.work.spared * prompt) / self._mean
        computing_s = work / (self.peak * self.machine.efficiencies.training.value * self.layout.train_gpus)
        return self._beside(computing_s, self._gathers_s(3) / max(1.0, self.work.positions))

    @property
    def _mean(self) -> int:
        """Positions of a row."""
        return max(1, round(self.work.prompt_tokens + self.work.lengths.mean))

    @property
    def _row(self) -> Flops:
        scored = round(self.work.lengths.mean * (1 - self.work.latent_share))
        return flops(self.dims, self._mean, scored=scored, causal=True)

    @property
    def _prompt(self) -> Flops:
        return flops(self.dims, round(self.work.prompt_tokens), scored=0, causal=True)

    def _beside(self, computing_s: float, moving_s: float) -> float:
        """Collectives and products at the same time: the longer one, and what of the shorter one does not hide."""
        hidden = self.machine.efficiencies.overlap.value
        return max(computing_s, moving_s) + (1 - hidden) * min(computing_s, moving_s)

    def _gathers_s(self, times: int) -> float:
        """Collectives of one pass over all sequences: so many a micro-batch."""
        of_rank = self.work.positions / self.layout.train_gpus
        least = self.work.minibatches
        rounds = max(least, -(-of_rank // self.work.micro_batch_tokens))
        return rounds * times * self.gathered_s(self.bytes - self.projector_bytes, self.dims.layers)

    @property
    def optimizer_s(self) -> float:
        """AdamW over a rank's share: bound by memory, or by PCIe where it is offloaded (ZeRO-Offload, arXiv 2101.06840)."""
        own = self.dims.parameters / (self.layout.train_gpus if self.recipe.parallel.kind != "single" else 1)
        if self.recipe.parallel.offload_optimizer:
            # Gradients go out and weights come back; the step itself runs on the host's memory, about as fast.
            return own * (2 * self.element + _OPTIMIZER_TRAFFIC / 4) / (self.machine.overheads.host_gb_s.value * 1e9)
        rate = self.machine.gpu.memory_tb_s * 1e12 * self.machine.efficiencies.memory_step.value
        return own * _OPTIMIZER_TRAFFIC / rate

    def publish_s(self, size: float) -> float:
        """Into engines of their own, or into the local engine's whole copy; nothing where it reads the shards.

        With `parallel.offload_between_phases` the states move to the host and back (12 bytes a parameter).
        """
        overheads = self.machine.overheads
        parked_s = 0.0
        if self.recipe.parallel.offload_between_phases and size == self.bytes:
            own = 12 * weight_elements(self.recipe, self.dims) / self.layout.train_gpus
            parked_s = 2 * own / (overheads.host_gb_s.value * 1e9)
        if self.layout.engine == "vllm":
            return parked_s + overheads.publish_s.value + size / (overheads.publish_gb_s.value * 1e9)
        return parked_s + (0.0 if self.per_layer else self.gathered_s(size, 1))

    @property
    def refresh_s(self) -> float:
        """Projector SFT on the refresh's rows: expand runs markers x latent steps forwards a micro-batch, and one
        (`lrscale.latent.expand`), each of which gathers every layer where weights are sharded, and once more in the
        backward pass."""
        if not self.work.refresh_every:
            return 0.0
        row = self.work.prompt_tokens + self.work.lengths.mean
        positions = self.work.refresh_rows * row
        latents = self.work.refresh_latents
        one = flops(self.dims, max(1, round(row)), causal=True)
        work = one.projector_training(checkpointing=self.recipe.model.gradient_checkpointing) * self.work.refresh_rows
        work += 3 * projector_flops(self.dims, self.recipe.projector.layers, latents * self.work.refresh_rows)
        computing_s = work / (self.peak * self.machine.efficiencies.training.value * self.layout.train_gpus)
        batches = -(-self.work.refresh_rows // self.recipe.stages.projector_sft.batch_rows)
        micro = max(batches, -(-positions // (self.work.micro_batch_tokens * self.layout.train_gpus)))
        size = self.bytes - self.projector_bytes
        moving_s = micro * (latents + 1) * 2 * self.gathered_s(size, self.dims.layers)
        return self._beside(computing_s, moving_s)

    @property
    def checkpoint_s(self) -> float:
        """Every rank writes its own file (the file system taken to write as fast as cluster.read_gib_s reads) and
        reads it again for its checksum (`lrscale.parallel.checkpoint`)."""
        size = checkpoint_bytes(self.recipe, self.dims, self.layout.train_gpus)
        written_s = size / 2**30 / (self.recipe.cluster.read_gib_s * self.layout.train_nodes)
        return written_s + size / self.layout.train_gpus / (self.machine.overheads.checksum_gb_s.value * 1e9)


def _strided(count: int) -> Iterator[int]:
    """0 to count - 1 in an order that mixes small and large, always the same one."""
    stride = next((step for step in range(max(1, int(count * 0.618)), count) if _coprime(step, count)), 1)
    return (index * stride % count for index in range(count))


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1
