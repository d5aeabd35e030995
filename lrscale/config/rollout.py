"""How sequences are sampled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lrscale.config.base import NonNegativeFloat, NonNegativeInt, PositiveInt, Section


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
