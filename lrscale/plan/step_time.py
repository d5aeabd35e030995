"""How long the parts of an RL step take, by a roofline: work over peak times efficiency, whichever limit is nearer.

`step_model` turns recipe, model, layout and machine into a handful of rates; simulations work with these alone, and
may be given measured ones instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrscale.config.hardware import Machine
from lrscale.config.recipe import Recipe
from lrscale.plan.checkpoint_bytes import checkpoint_bytes
from lrscale.plan.collectives import all_reduce_s, gather_s
from lrscale.plan.flops import Flops, flops, projector_flops
from lrscale.plan.gathering import gather
from lrscale.plan.layout import Layout, require_layout
from lrscale.plan.memory import cache_positions
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.packing import Packed, packed
from lrscale.plan.states import ELEMENT_BYTES, weight_elements
from lrscale.plan.step_rates import StepModel
from lrscale.plan.workload import Workload, scoring_workers, workload

_OPTIMIZER_TRAFFIC = 28
"""Bytes that a fused AdamW step reads and writes a parameter: gradient 2, master, two moments in and out 24, weight 2."""
_ROWS_OF_A_SUM = 64
"""Rows of the sums between an engine's GPUs: their start-up counts, hardly their size."""


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
    engines_s = machine.overheads.engine_start_s.value if layout.engine == "vllm" else 0.0  # they are given weights
    rate, experts = job.memory_rate * layout.tensor_parallel, dims.experts
    return StepModel(
        engines=layout.engines,
        gpus_per_engine=layout.tensor_parallel,
        prefill_positions_per_s=job.computing_rate / job.products,
        shared_cache=layout.engine == "vllm",
        refills=layout.engine == "vllm",
        step_s=job.step_s,
        weights_s=(job.bytes - job.projector_bytes - job.experts_bytes) / rate,
        experts_s=job.experts_bytes / rate,
        expert_share=experts.active / experts.count if experts else 0.0,
        projector_s=job.projector_bytes / rate,
        position_s=dims.kv_bytes_per_token(job.element)
        / (job.memory_rate * min(layout.tensor_parallel, dims.kv_heads)),
        row_s=job.products / job.computing_rate,
        cache_positions=cache_positions(recipe, dims, layout, machine),
        batch_limit=recipe.rollout.batch_rows,
        logprob_s=job.logprob_s,
        update_s=job.update_s,
        optimizer_s=job.optimizer_s,
        publish_s=job.publish_s(job.bytes),
        projector_sft_s=job.projector_sft_s(job.work.sft_rows),
        refresh_s=job.projector_sft_s(job.work.refresh_rows if job.work.refresh_every else 0),
        checkpoint_s=job.checkpoint_s,
        load_s=load_s,
        start_s=machine.overheads.start_s.value + max(0.0, engines_s - load_s) + job.publish_s(job.bytes),
        resume_s=job.resume_s,
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
        """Floating point operations a second of one GPU; float64 at half the pace of float32."""
        gpu = self.machine.gpu
        return 1e12 * (gpu.bf16_tflops if self.element < 4 else gpu.fp32_tflops * 4 / self.element)

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
        seconds = gather_s(
            self.machine, size, nodes=layout.train_nodes, gpus_per_node=layout.gpus_per_node, messages=messages
        )
        if self.recipe.parallel.offload_parameters:  # each rank's share comes from its host first
            seconds += size / layout.train_gpus / (self.machine.overheads.host_gb_s.value * 1e9)
        return seconds

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
        computing_s = (
            self._padding * work / (self.peak * self.machine.efficiencies.prefill.value * self.layout.train_gpus)
        )
        return self._beside(computing_s, self._gathers_s(1) / max(1.0, self.work.positions))

    @property
    def update_s(self) -> float:
        """Products over the training ranks, padding and waiting counted; each micro-batch gathers the weights for forward
        and backward, and reduces gradients once (ZeRO, arXiv 1910.02054, section 7.2: 3 x the parameters a step, here a
        micro-batch; 4 with gradients in float32)."""
        checkpointing = self.recipe.model.gradient_checkpointing
        row, prompt = (one.training(checkpointing=checkpointing) for one in (self._row, self._prompt))
        work = (row - self.work.spared * prompt) / self._mean
        computing_s = (
            self._padding * work / (self.peak * self.machine.efficiencies.training.value * self.layout.train_gpus)
        )
        times = 2 + (4 / self.element if self.recipe.parallel.fp32_gradients and self.element < 4 else 1)
        return self._beside(computing_s, self._gathers_s(times) / max(1.0, self.work.positions))

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

    @property
    def _packed(self) -> Packed:
        work, prompt = self.work, round(self.work.prompt_tokens)
        lengths = tuple(prompt + own for own in work.lengths.quantiles(work.sequences))
        return packed(lengths, work.micro_batch_tokens, self.layout.train_gpus, work.minibatches)

    @property
    def _padding(self) -> float:
        """Positions that ranks run or wait for, over those that there are."""
        return self._packed.positions / max(1.0, self.work.positions)

    def _gathers_s(self, times: float) -> float:
        """Collectives of one pass over all sequences: so many a micro-batch."""
        return self._packed.rounds * times * self.gathered_s(self.bytes - self.projector_bytes, self.dims.layers)

    @property
    def optimizer_s(self) -> float:
        """AdamW over a rank's share: bound by memory, or by PCIe where it is offloaded (ZeRO-Offload, arXiv 2101.06840)."""
        own = self.dims.parameters / (self.layout.train_gpus if self.recipe.parallel.kind != "single" else 1)
        if self.recipe.parallel.offload_optimizer:
            # Gradients go out and weights come back; the step itself reads and writes the host's memory.
            overheads = self.machine.overheads
            moved_s = own * 2 * self.element / (overheads.host_gb_s.value * 1e9)
            host_rate = overheads.host_memory_gb_s.value * 1e9 / self.layout.gpus_per_node
            return moved_s + own * _OPTIMIZER_TRAFFIC / host_rate
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
            return (
                parked_s + overheads.publish_s.value + size / (overheads.publish_gb_s.value * 1e9) + self.files_s(size)
            )
        return parked_s + (0.0 if self.per_layer else self.gathered_s(size, 1))

    def files_s(self, size: float) -> float:
        """What it takes longer where engines get weights as files (`lrscale.rollout.weight_files`): the main
        rank writes them, every worker reads them to check them and once more to load them; on nodes of their own, over the
        file system first."""
        if not self.layout.weight_files:
            return 0.0
        passes_s = 3 * size / (self.machine.overheads.files_gb_s.value * 1e9)
        shared = 0.0 if self.layout.colocated else 2 * size / 2**30 / self.recipe.cluster.read_gib_s
        return passes_s + shared

    def projector_sft_s(self, rows: int) -> float:
        """Over so many rows, once: expand runs markers x latent steps forwards a micro-batch, and one
        (`lrscale.latent.expand`), each of which gathers every layer where weights are sharded, and once more in the
        backward pass."""
        if not rows:
            return 0.0
        row = self.work.prompt_tokens + self.work.lengths.mean
        positions = rows * row
        latents = self.work.refresh_latents
        one = flops(self.dims, max(1, round(row)), causal=True)
        work = one.projector_training(checkpointing=self.recipe.model.gradient_checkpointing) * rows
        work += 3 * projector_flops(self.dims, self.recipe.projector.layers, latents * rows)
        computing_s = work / (self.peak * self.machine.efficiencies.training.value * self.layout.train_gpus)
        batches = -(-rows // self.recipe.stages.projector_sft.batch_rows)
        micro = max(batches, -(-positions // (self.work.micro_batch_tokens * self.layout.train_gpus)))
        size = self.bytes - self.projector_bytes
        moving_s = micro * (latents + 1) * 2 * self.gathered_s(size, self.dims.layers)
        return self._beside(computing_s, moving_s)

    @property
    def resume_s(self) -> float:
        """All ranks check the files that they read (`lrscale.parallel.checkpoint`)."""
        size = checkpoint_bytes(self.recipe, self.dims, self.layout.train_gpus)
        read_s = size / 2**30 / (self.recipe.cluster.read_gib_s * self.layout.train_nodes)
        return 2 * read_s + size / self.layout.train_gpus / (self.machine.overheads.checksum_gb_s.value * 1e9)

    @property
    def checkpoint_s(self) -> float:
        """Every rank writes its own file (the file system taken to write as fast as cluster.read_gib_s reads) and
        reads it again for its checksum (`lrscale.parallel.checkpoint`)."""
        size = checkpoint_bytes(self.recipe, self.dims, self.layout.train_gpus)
        written_s = size / 2**30 / (self.recipe.cluster.read_gib_s * self.layout.train_nodes)
        return written_s + size / self.layout.train_gpus / (self.machine.overheads.checksum_gb_s.value * 1e9)
