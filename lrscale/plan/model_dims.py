"""How large a model is, from a handful of numbers: those of its config.json, or of models that many people use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelDims:
    """A decoder of the Llama kind: gated MLP, grouped queries, RMS norms."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    """The LM head is the embedding."""
    head_norms: bool = False
    """Queries and keys are normalised a head (Qwen3)."""

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        norms = 2 * self.hidden + 2 * self.head_dim * self.head_norms
        return attention + 3 * self.hidden * self.intermediate + norms

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    def projector_parameters(self, layers: int) -> int:
        """Of a Reasoning Projector of so many copies of the last MLP (norms of the `normalised` kind left out)."""
        return 3 * layers * self.hidden * self.intermediate

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Keys and values of one position in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


_LLAMA_70B = ModelDims(8192, 80, heads=64, kv_heads=8, head_dim=128, intermediate=28672, vocabulary=128256)
_LLAMA_8B = ModelDims(4096, 32, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocabulary=128256)
_QWEN3_4B = ModelDims(
    2560, 36, heads=32, kv_heads=8, head_dim=128, intermediate=9728, vocabulary=151936, tied=True, head_norms=True
)
_TINY = ModelDims(128, 4, heads=4, kv_heads=4, head_dim=32, intermediate=384, vocabulary=256)

KNOWN: Mapping[str, ModelDims] = {
    "builtin:tiny": _TINY,
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA_70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
}
"""By hub id: a login node can plan for them before anything was downloaded."""


def dims_of_config(config: Mapping[str, Any]) -> ModelDims | None:
    """The dimensions that a config.json of transformers tells; None where it is of another kind."""
    config = config.get("text_config", config)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    values = [value for name in names if isinstance(value := config.get(name), int) and value > 0]
    if len(values) < len(names):
        return None
    hidden, layers, heads, intermediate, vocabulary = values
    return ModelDims(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=intermediate,
        vocabulary=vocabulary,
        tied=bool(config.get("tie_word_embeddings")),
        head_norms=config.get("model_type") in ("qwen3", "qwen3_moe"),
    )
