"""The recipe: everything that decides what a run does, in one validated value."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from lrscale.config.base import NonNegativeInt, Section
from lrscale.config.cluster import ClusterConfig, ParallelConfig, ReportConfig
from lrscale.config.model import ModelConfig, ProjectorConfig
from lrscale.config.optimisation import OptimisationConfig
from lrscale.config.rollout import LocalRolloutConfig, RewardConfig, TaskRewardConfig
from lrscale.config.stages import StagesConfig
from lrscale.config.task import FlawedStoriesConfig, TaskConfig

RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Recipe(Section):
    """One run, from traces to report."""

    name: RunName = "run"
    """Names the run directory: letters, digits, dot, dash, underscore; at most 64."""
    seed: NonNegativeInt = 0
    model: ModelConfig = ModelConfig()
    projector: ProjectorConfig = ProjectorConfig()
    task: TaskConfig = Field(default_factory=FlawedStoriesConfig)
    stages: StagesConfig = StagesConfig()
    rollout: LocalRolloutConfig = LocalRolloutConfig()
    reward: RewardConfig = Field(default_factory=TaskRewardConfig)
    optimisation: OptimisationConfig = OptimisationConfig()
    parallel: ParallelConfig = ParallelConfig()
    cluster: ClusterConfig = ClusterConfig()
    report: ReportConfig = ReportConfig()
