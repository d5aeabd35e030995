"""Optimizer, schedule and micro-batching, shared by every stage that trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lrscale.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section, Share

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


SEEN_BUDGETS = 4
"""Positions that the rows of a micro-batch may look at, shared prompts counted for each row, in micro_batch_tokens: keys
and values of the prompts are copied to all rows."""
SHARING_GAIN = 0.75
"""Prompts are shared where that leaves at most this share of the positions to run."""


class OptimisationConfig(Section):
    """AdamW with warm-up and an optional cosine decay; the learning rate belongs to each stage."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    micro_batch_tokens: PositiveInt = 16384
    """A micro-batch holds at most this many positions, padding counted (always at least one row)."""
    share_prompts: bool = False
    """RL updates of one process (`parallel.kind: single`) run a prompt once for all samples of it in a micro-batch, where
    that spares a quarter of the positions or more; log-probs stay the same but for rounding. It takes room for a second
    gradient of the base: weights are used twice before either gradient is whole. Sharded engines, which could not
    reduce a layer's gradient until the end, run whole rows."""


class ScheduleConfig(Section):
    """Learning rate over the steps of one stage."""

    kind: Literal["constant", "cosine"] = "constant"
    warmup_share: Share = 0.0
    """Share of the steps spent rising linearly from 0."""
    final_share: Share = 0.1
    """Cosine only: the last learning rate as a share of the peak."""
