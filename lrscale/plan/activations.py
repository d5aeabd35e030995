"""What a forward keeps for its backward pass, position by position, as transformers' layers keep it.

Counted operation by operation as autograd saves it, attention's scores left out (Korthikanti et al., arXiv 2205.05198,
section 4.1, does so for GPT-3 in Megatron's layers); a test holds it against saved tensors of every kind of model.
"""

from __future__ import annotations

from lrscale.plan.model_dims import ModelDims

_WIDE = 4
"""Bytes of float32, in which norms are computed whatever the model's type."""


def kept_bytes(dims: ModelDims, element: int) -> int:
    """Of all layers, a position, without checkpointing."""
    return sum(count * _layer_bytes(dims, element, layer) for layer, count in dims.layer_kinds)


def recomputed_bytes(dims: ModelDims, element: int) -> int:
    """Of the layer that keeps most, a position: with checkpointing one at a time is there in full."""
    return max(_layer_bytes(dims, element, layer) for layer, _ in dims.layer_kinds)


def passing_bytes(dims: ModelDims, element: int) -> int:
    """Of a layer's gradients in its backward pass, a position: of the MLP's two halves beyond what is freed by then, and
    of the residual."""
    return element * (2 * _widest(dims) + dims.hidden)


def forward_bytes(dims: ModelDims, element: int) -> int:
    """Of a forward without gradients at its height, a position: the MLP's two halves and their product, the residual,
    and the norm's copies."""
    return element * (3 * _widest(dims) + 4 * dims.hidden)


def input_bytes(dims: ModelDims, element: int) -> int:
    """Of the layers' inputs, a position: what checkpointing keeps of each (Chen et al., arXiv 1604.06174)."""
    return element * dims.layers * dims.hidden


def _layer_bytes(dims: ModelDims, element: int, layer: int) -> int:
    attended = 2 * dims.head_dim * (dims.heads + dims.kv_heads)  # queries, keys and values as attended, and the sum
    return _norm_bytes(dims, element) + element * attended + _mlp_bytes(dims, element, layer)


def _norm_bytes(dims: ModelDims, element: int) -> int:
    """The norms' inputs in float32, what is multiplied by the weight, and what the next product reads.

    Norms behind attention and MLP (Gemma 2 and 3) feed the residual, which keeps nothing. Gemma multiplies by its
    weight in float32. GPT-2's fused norms keep input and output alone.
    """
    if dims.learned_positions:
        return 4 * element * dims.hidden
    scaled = _WIDE if dims.wide_norms else element
    before, behind = 2, dims.norms - 2
    heads = dims.head_norms * dims.head_dim * (dims.heads + dims.kv_heads)
    return dims.hidden * (before * (_WIDE + scaled + element) + behind * (_WIDE + scaled)) + heads * (_WIDE + scaled)


def _mlp_bytes(dims: ModelDims, element: int, layer: int) -> int:
    """Gate, its activation, the other half, and their product; for experts also each one's copy of the input and its
    output, which is weighted; for a shared expert its output."""
    if dims.learned_positions:
        return 5 * element * dims.intermediate  # one half, and four steps of GELU's tanh form
    experts = dims.experts
    if experts is None or layer in experts.dense_layers:
        return 4 * element * dims.intermediate
    shared = 4 * experts.shared_intermediate + dims.hidden * bool(experts.shared_intermediate)
    return element * (experts.active * (4 * experts.intermediate + 2 * dims.hidden) + shared)


def _widest(dims: ModelDims) -> int:
    return max(_mlp_width(dims, layer) for layer, _ in dims.layer_kinds)


def _mlp_width(dims: ModelDims, layer: int) -> int:
    experts = dims.experts
    if experts is None or layer in experts.dense_layers:
        return dims.intermediate
    return experts.active * experts.intermediate
