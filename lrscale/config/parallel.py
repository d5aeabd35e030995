"""How policy and projector are spread over ranks, what is kept where, and how long ranks wait for each other."""

from __future__ import annotations

from typing import Literal

from lrscale.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class ParallelConfig(Section):
    """How policy and projector are spread over ranks."""

    kind: Literal["single", "zero3", "fsdp2"] = "single"
    """`single`: one process; `zero3`: DeepSpeed ZeRO-3; `fsdp2`: PyTorch's fully_shard."""
    threads: PositiveInt | None = None
    """torch threads a process on CPU; null takes all cores, or one where several ranks share the machine's CPU."""
    ranks_per_node: PositiveInt | None = None
    """Processes a node; null takes one a GPU (cluster.gpus_per_node). On a CPU it is set by hand."""
    ds_config: str = "zero3"
    """zero3 only: a name in ds_configs/, or a path to a DeepSpeed JSON file (relative to the recipe)."""
    gather: Literal["auto", "whole", "per_layer"] = "auto"
    """Local rollout on sharded weights. `whole`: each rank decodes by itself on a whole copy; `per_layer`: all ranks
    decode step by step on their shards; `auto`: whole where whole_gather_gib suffices."""
    whole_gather_gib: PositiveFloat = 16.0
    """The largest whole copy of the weights that a rank may hold, in GiB."""
    stall_limit_s: PositiveFloat = 1800.0
    """Longest wait of a rank for the others, in seconds; then the run ends and names who is missing."""
    collective_timeout_s: PositiveFloat = 3600.0
    """Time-out of torch's process groups in seconds, the last resort; at least stall_limit_s."""
    fp32_gradients: bool = False
    """zero3 with a bfloat16 model: accumulate and reduce gradients in float32."""
    offload_optimizer: bool = False
    """zero3 only: moments and float32 masters live in CPU memory, and the optimizer steps there."""
    offload_parameters: bool = False
    """zero3 only: this rank's share of the weights lives in CPU memory between uses."""
    offload_between_phases: bool = False
    """zero3 only: moments, masters and gradients move to CPU memory while sequences are decoded."""
    lockstep: bool = True
    """For tests: false lets ranks run loops of different lengths, which hangs them or computes something wrong."""
    check_order: bool = False
    """For debugging: log the order of module calls on every rank and compare the logs of all ranks."""


class CheckpointsConfig(Section):
    """Which checkpoints of a stage stay on disk."""

    keep_last: PositiveInt = 2
    """The newest so many; the second newest is what a damaged newest one falls back to."""
    keep_best: NonNegativeInt = 0
    """Besides these, so many with the highest mean reward."""
