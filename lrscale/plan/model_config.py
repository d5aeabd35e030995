"""The keys of a model's config.json that tell how large it is, and what each of them may be."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lrscale.config.base import PositiveInt
from lrscale.config.schema import allowed

Count = Annotated[int, Field(ge=1, le=10_000)]
"""Layers, heads, experts: published models have hundreds. Beyond this limit and the two below a number is a slip, of
which a plan would print nonsense, or take all memory of a login node."""
Width = Annotated[int, Field(ge=1, le=1_000_000)]
"""Published: 53,248 at most."""
Rows = Annotated[int, Field(ge=1, le=100_000_000)]
"""Of an embedding. Published: 262,208 at most."""


class ModelConfigError(ValueError):
    """A config.json that does not say how large the model is."""


class ModelKeys(BaseModel):
    """Nothing is converted: a number in quotes is none. Keys that are not named here are not read."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class DecoderKeys(ModelKeys):
    """What Llama calls them, and most others."""

    hidden_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Width
    vocab_size: Rows
    num_key_value_heads: Count | None = None
    head_dim: Width | None = None
    max_position_embeddings: PositiveInt | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool | None = None


class MixtralKeys(DecoderKeys):
    """Experts in every layer, as wide as the MLP whose place they take."""

    num_local_experts: Count
    num_experts_per_tok: Count


class QwenMoeKeys(DecoderKeys):
    """Experts of a width of their own, not in every layer."""

    num_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Width
    decoder_sparse_step: PositiveInt = 1
    mlp_only_layers: Annotated[tuple[int, ...], Field(strict=False)] = ()  # JSON has lists

    @model_validator(mode="before")
    @classmethod
    def _by_its_other_name(cls, config: dict[str, Any]) -> dict[str, Any]:
        """transformers 5 saves num_experts of Qwen3 as num_local_experts."""
        other = config.get("num_local_experts")
        return config if other is None else {"num_experts": other, **config}


class Qwen2MoeKeys(QwenMoeKeys):
    """And one expert that every token passes."""

    shared_expert_intermediate_size: Width


class Gpt2Keys(ModelKeys):
    """GPT-2's own names."""

    n_embd: Width
    n_layer: Count
    n_head: Count
    n_positions: Rows
    vocab_size: Rows
    n_inner: Width | None = None
    tie_word_embeddings: bool = True


Keys = TypeVar("Keys", bound=ModelKeys)


def read_keys(keys: type[Keys], config: Mapping[str, Any]) -> Keys:
    """The keys of a config.json; null is as good as left out.

    Raises:
        ModelConfigError: naming every key that is missing or holds something else than it may.
    """
    try:
        return keys.model_validate({name: value for name, value in config.items() if value is not None})
    except ValidationError as error:
        given: dict[str, list[str]] = {}
        for name in dict.fromkeys(str(problem["loc"][0]) for problem in error.errors()):
            field = keys.model_fields[name]
            value = f"is {reprlib.repr(config[name])}" if name in config else "is missing"
            given.setdefault(allowed(field.annotation, tuple(field.metadata)), []).append(f"{name} {value}")
        said = "; ".join(f"{', '.join(names)} (needed: {need})" for need, names in given.items())
        raise ModelConfigError(said) from error
