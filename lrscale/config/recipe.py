"""The recipe: everything that decides what a run does, in one validated value."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints, field_validator

from lrscale.config.base import NonNegativeInt, Section
from lrscale.config.cluster import ClusterConfig, ReportConfig
from lrscale.config.model import ModelConfig, ProjectorConfig
from lrscale.config.optimisation import OptimisationConfig
from lrscale.config.parallel import CheckpointsConfig, ParallelConfig
from lrscale.config.reward import RewardConfig, TaskRewardConfig
from lrscale.config.rollout import LocalRolloutConfig, RolloutConfig
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
    rollout: RolloutConfig = Field(default_factory=LocalRolloutConfig)
    reward: RewardConfig = Field(default_factory=TaskRewardConfig)
    optimisation: OptimisationConfig = OptimisationConfig()
    parallel: ParallelConfig = ParallelConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    report: ReportConfig = ReportConfig()

    @field_validator("rollout", mode="before")
    @classmethod
    def _local_rollouts(cls, rollout: Any) -> Any:
        """A recipe that does not name a kind means the local one."""
        return {"kind": "local", **rollout} if isinstance(rollout, dict) else rollout

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node: as set, or one a GPU."""
        return self.parallel.ranks_per_node or self.cluster.gpus_per_node

    @property
    def shares_prompts(self) -> bool:
        """Whether RL updates run a prompt once for its samples: where asked for, and in one process alone."""
        return self.optimisation.share_prompts and self.parallel.kind == "single"

    @property
    def world_size(self) -> int:
        """Processes altogether."""
        return self.cluster.nodes * self.ranks_per_node
