"""How large a model is, from its config.json: what has to be counted, and the keys that tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lrscale.config.shipped import shipped_models
from lrscale.plan.model_config import (
    DecoderKeys,
    Gpt2Keys,
    MixtralKeys,
    ModelConfigError,
    Qwen2MoeKeys,
    QwenMoeKeys,
    read_keys,
)

_BIASED_QKV = ("qwen2", "qwen2_moe")
"""Biases of queries, keys and values that no key of the config switches off."""
_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text")
_FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text")
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3", "gemma3_text", "gpt2")
_COUNTED = ("llama", "mistral", "mixtral", "gemma", "gpt2", *_BIASED_QKV, *_HEAD_NORMS, *_FOUR_NORMS)
_FOREIGN = ("kv_lora_rank", "n_routed_experts", "ssm_cfg", "linear_num_key_heads", "d_state", "attn_layer_indices")
"""Keys of blocks that are not counted here: latent attention, state spaces, linear attention."""
_MIXTURES: Mapping[str, type[DecoderKeys]] = {
    "mixtral": MixtralKeys,
    "qwen2_moe": Qwen2MoeKeys,
    "qwen3_moe": QwenMoeKeys,
}
"""In which kinds experts are counted; any other kind with a key about experts has them placed or joined otherwise."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture of experts in place of the MLP."""

    count: int
    active: int
    """Experts that a token is sent through."""
    intermediate: int
    """Width of one of them."""
    shared_intermediate: int = 0
    """Width of the expert that every token passes (Qwen2-MoE)."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have an ordinary MLP all the same."""


@dataclass(frozen=True, slots=True)
class ModelDims:
    """A decoder: gated MLP, grouped queries and RMS norms, unless a field says otherwise."""

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
    """Queries and keys are normalised a head (Qwen3, Gemma 3)."""
    biases: tuple[str, ...] = ()
    """Of `qkv`, `o`, `mlp`: which projections have a bias."""
    norms: int = 2
    """RMS norms a layer: 4 in Gemma 2 and 3."""
    wide_norms: bool = False
    """Norms multiply by their weight in float32 (Gemma)."""
    experts: Experts | None = None
    learned_positions: int = 0
    """GPT-2: rows of the position embedding, which also stands for layer norms with bias and an MLP without gate."""
    positions: int | None = None
    """That a sequence may have, however rotary embeddings are scaled; None where the config does not say."""
    exact: bool = True
    """Whether parameters are counted as this model has them, and not as if it were a Llama."""

    @property
    def gated(self) -> bool:
        return not self.learned_positions

    @property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """A layer of each kind that there is (with an MLP, with experts), and how many there are of it."""
        dense = self.experts.dense_layers if self.experts is not None else ()
        with_experts = sorted(set(range(self.layers)).difference(dense))
        kinds = (
            (with_experts[0], len(with_experts)) if with_experts else None,
            (dense[0], len(dense)) if dense else None,
        )
        return tuple(kind for kind in kinds if kind is not None)

    @property
    def ends_in_mixture(self) -> bool:
        """Whether experts take the place of the last MLP, so that the runtime has none to clone a projector from."""
        return self.experts is not None and self.layers - 1 not in self.experts.dense_layers

    @property
    def attention_matrices(self) -> int:
        """Elements of a layer's query, key, value and output projections."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    def mlp_matrices(self, layer: int, *, active: bool) -> int:
        """Elements of a layer's MLP, or of all of its experts (`active`: of those that a token passes) and the router."""
        one = (3 if self.gated else 2) * self.hidden
        experts = self.experts
        if experts is None or layer in experts.dense_layers:
            return one * self.intermediate
        routed = (experts.active if active else experts.count) * experts.intermediate
        gate = self.hidden if experts.shared_intermediate else 0
        return one * (routed + experts.shared_intermediate) + self.hidden * experts.count + gate

    @property
    def layer_parameters(self) -> int:
        """Of the largest layer."""
        return max(self._parameters_of(layer) for layer, _ in self.layer_kinds)

    @property
    def parameters(self) -> int:
        """Equal to the sum over `lrscale.plan.tensors.model_tensors`."""
        return self._embeddings + sum(count * self._parameters_of(layer) for layer, count in self.layer_kinds)

    @property
    def active_parameters(self) -> int:
        """That a token passes: fewer than `parameters` in a mixture of experts."""
        idle = sum(
            count * (self.mlp_matrices(layer, active=False) - self.mlp_matrices(layer, active=True))
            for layer, count in self.layer_kinds
        )
        return self.parameters - idle

    def projector_parameters(self, layers: int, kind: str = "paper") -> int:
        """Of a Reasoning Projector: so many copies of the last MLP (method: LiteReason, arXiv 2512.02240, section 3).

        Of a mixture of experts, which no projector can be cloned from, the dense width counts.
        """
        gain = self.hidden if kind != "paper" else 0
        return layers * ((3 if self.gated else 2) * self.hidden * self.intermediate + self._mlp_biases) + gain

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Keys and values of one position, token or latent, in all layers. Sliding windows save nothing here."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes

    @property
    def _mlp_biases(self) -> int:
        if "mlp" not in self.biases:
            return 0
        return self.hidden + (2 if self.gated else 1) * self.intermediate

    @property
    def _embeddings(self) -> int:
        norm = self.hidden * (1 if self.gated else 2)
        return (self.vocabulary * (1 if self.tied else 2) + self.learned_positions) * self.hidden + norm

    def _parameters_of(self, layer: int) -> int:
        norms = self.norms * self.hidden * (1 if self.gated else 2) + 2 * self.head_dim * self.head_norms
        qkv = self.head_dim * (self.heads + 2 * self.kv_heads) if "qkv" in self.biases else 0
        out = self.hidden if "o" in self.biases else 0
        return self.attention_matrices + self.mlp_matrices(layer, active=False) + self._mlp_biases + norms + qkv + out


@cache
def known_dims() -> Mapping[str, ModelDims]:
    """By hub id: a login node can plan for them before anything was downloaded."""
    return {model_id: read_dims(model.config) for model in shipped_models() for model_id in model.ids}


def dims_of_config(config: Mapping[str, Any]) -> ModelDims | None:
    """The dimensions that a config.json of transformers tells; None where it is of another kind."""
    try:
        return read_dims(config)
    except ModelConfigError:
        return None


def read_dims(config: Mapping[str, Any]) -> ModelDims:
    """The dimensions that a config.json of transformers tells.

    Raises:
        ModelConfigError: naming every key that it lacks or that holds what it may not, or a kind of block that is not
            counted.
    """
    inner = config.get("text_config", config)
    config = inner if isinstance(inner, Mapping) else config
    kind = str(config.get("model_type", "llama"))
    foreign = [key for key, value in config.items() if value and _is_foreign(key, kind)]
    if foreign:
        raise ModelConfigError(
            f"model_type {kind} has {foreign[0]}, a kind of block that the plan does not count; "
            "it knows Llama, Qwen2, Qwen3, Mistral, Mixtral, Gemma and GPT-2"
        )
    if kind == "gpt2":
        return _gpt2(read_keys(Gpt2Keys, config))
    return _llama_like(read_keys(_MIXTURES.get(kind, DecoderKeys), config), kind)


def _is_foreign(key: str, kind: str) -> bool:
    return key in _FOREIGN or ("expert" in key and kind not in _MIXTURES)


def _llama_like(keys: DecoderKeys, kind: str) -> ModelDims:
    hidden, heads, kv_heads = keys.hidden_size, keys.num_attention_heads, keys.num_key_value_heads
    if kv_heads is None:
        kv_heads = heads
    if heads % kv_heads:
        raise ModelConfigError(
            f"num_attention_heads is {heads}, no multiple of num_key_value_heads, which is {kv_heads}"
        )
    if keys.head_dim is None and hidden % heads:
        raise ModelConfigError(
            f"hidden_size is {hidden}, no multiple of num_attention_heads, which is {heads}, and there is no head_dim"
        )
    biases = {"qkv": keys.attention_bias or kind in _BIASED_QKV, "o": keys.attention_bias, "mlp": keys.mlp_bias}
    return ModelDims(
        hidden=hidden,
        layers=keys.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=keys.head_dim or hidden // heads,
        intermediate=keys.intermediate_size,
        vocabulary=keys.vocab_size,
        tied=kind in _TIED_BY_DEFAULT if keys.tie_word_embeddings is None else keys.tie_word_embeddings,
        head_norms=kind in _HEAD_NORMS,
        biases=tuple(name for name, there in biases.items() if there),
        norms=4 if kind in _FOUR_NORMS else 2,
        wide_norms=kind.startswith("gemma"),
        experts=_experts(keys),
        positions=keys.max_position_embeddings,
        exact=kind in _COUNTED,
    )


def _experts(keys: DecoderKeys) -> Experts | None:
    if isinstance(keys, MixtralKeys):
        experts = Experts(keys.num_local_experts, keys.num_experts_per_tok, keys.intermediate_size)
    elif isinstance(keys, QwenMoeKeys):
        experts = Experts(
            keys.num_experts,
            keys.num_experts_per_tok,
            keys.moe_intermediate_size,
            keys.shared_expert_intermediate_size if isinstance(keys, Qwen2MoeKeys) else 0,
            tuple(
                layer
                for layer in range(keys.num_hidden_layers)
                if layer in keys.mlp_only_layers or (layer + 1) % keys.decoder_sparse_step
            ),
        )
    else:
        return None
    if experts.active > experts.count:
        raise ModelConfigError(
            f"num_experts_per_tok is {experts.active}, more than the {experts.count} experts that there are"
        )
    return experts


def _gpt2(keys: Gpt2Keys) -> ModelDims:
    hidden, heads = keys.n_embd, keys.n_head
    if hidden % heads:
        raise ModelConfigError(f"n_embd is {hidden}, no multiple of n_head, which is {heads}")
    return ModelDims(
        hidden=hidden,
        layers=keys.n_layer,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=keys.n_inner or 4 * hidden,
        vocabulary=keys.vocab_size,
        tied=keys.tie_word_embeddings,
        biases=("qkv", "o", "mlp"),
        learned_positions=keys.n_positions,
        positions=keys.n_positions,
    )
