"""Where a run runs, and what it reports to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import StringConstraints

from lrscale.config.base import PositiveInt, Section

TimeLimit = Annotated[str, StringConstraints(pattern=r"^(\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d){0,2})$")]


class ClusterConfig(Section):
    """What is asked of SLURM."""

    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 1
    partition: str | None = None
    account: str | None = None
    time_limit: TimeLimit | None = None
    """SLURM's forms: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; quoted if it is minutes alone."""


class ReportConfig(Section):
    """Where figures go besides metrics.jsonl, which is always written."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    project: str = "lrscale"
    html: bool = True
    """Write report.html and its PNG chart when the run ends."""
