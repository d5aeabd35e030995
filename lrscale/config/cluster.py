"""Where a run runs, how it is sharded, and what it reports to."""

from __future__ import annotations

from typing import Literal

from lrscale.config.base import PositiveInt, Section


class ParallelConfig(Section):
    """How policy and projector are spread over ranks."""

    kind: Literal["single", "zero3", "fsdp2"] = "single"
    threads: PositiveInt | None = None
    """torch threads a process on CPU; null takes all cores."""


class ClusterConfig(Section):
    """What is asked of SLURM."""

    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 1
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None
    """SLURM's forms: minutes, HH:MM:SS or D-HH:MM:SS."""


class ReportConfig(Section):
    """Where figures go besides metrics.jsonl, which is always written."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    project: str = "lrscale"
    html: bool = True
    """Write report.html and its PNG chart when the run ends."""
