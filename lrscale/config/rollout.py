"""How sequences are sampled, and how they are scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lrscale.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Share


class LocalRolloutConfig(Section):
    """Decoding in the training process itself."""

    kind: Literal["local"] = "local"
    max_new_tokens: PositiveInt = 2048
    """Positions a completion may take: discrete tokens plus latent steps."""
    min_new_tokens: NonNegativeInt = 0
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegativeInt = 0
    """0 keeps the whole vocabulary."""
    batch_rows: PositiveInt = 256
    """Sequences decoded side by side."""


RolloutConfig = LocalRolloutConfig


class LengthPenaltyConfig(Section):
    """A price on length, subtracted from the reward of right answers."""

    price_per_100: NonNegativeFloat = 0.0
    """Reward lost per 100 positions."""
    latent_weight: NonNegativeFloat = 1.0
    """What a latent step costs, in tokens."""


class TaskRewardConfig(Section):
    """The task's own rule (exact boxed answer)."""

    kind: Literal["task"] = "task"
    length_penalty: LengthPenaltyConfig = LengthPenaltyConfig()


class FunctionRewardConfig(Section):
    """A Python function in the user's file, as TRL or as OpenRLHF writes them."""

    kind: Literal["function"]
    path: str
    """Python file, relative to the recipe."""
    name: str = ""
    """Function in that file; empty takes `reward`, `reward_func` or `reward_fn`, whichever is there."""
    max_failed_share: Share = 0.2
    """Past this share of failed scores in a step the run stops."""
    timeout_s: PositiveFloat = 60.0
    """Reserved for the killable reward pool; the in-process scorer refuses any other value."""
    length_penalty: LengthPenaltyConfig = LengthPenaltyConfig()


RewardConfig = Annotated[TaskRewardConfig | FunctionRewardConfig, Field(discriminator="kind")]
