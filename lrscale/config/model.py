"""Which policy is trained, and the Reasoning Projector beside it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lrscale.config.base import PositiveInt, Section


class ModelConfig(Section):
    """The base model, loaded by transformers' AutoModelForCausalLM."""

    path: str = "builtin:tiny"
    """Hub id, local folder, or `builtin:tiny` (ships with the package)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: bool = False
    chat_template: bool = False
    """Wrap each prompt in the tokenizer's chat template as one user message."""
    add_marker_tokens: bool = False
    """Give the marker's tags tokens of their own where the tokenizer has none; they start as the mean of their pieces."""
    logits_mib: PositiveInt = 256
    """The LM head runs in chunks so that logits never take more than this many MiB."""


class ProjectorConfig(Section):
    """The Reasoning Projector (method, section 3)."""

    kind: Literal["paper", "normalised", "residual"] = "paper"
    """`paper`: stacked copies of the last MLP; `normalised`: RMS norm before each block and at the end, learned gain;
    `residual`: the same, each block's input added to its output."""
    path: str = ""
    """Folder of a projector to start from (`lrscale export --projector-only`); empty: the model's own, or its last MLP."""
    layers: PositiveInt = 3
    max_latent_steps: Annotated[int, Field(ge=1, le=256)] = 32
    """A marker's number is clamped to [1, this]."""
