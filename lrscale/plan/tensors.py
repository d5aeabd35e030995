"""The tensors of a model and its projector, as transformers makes them: names and shapes, nothing allocated.

What a rank keeps of each under ZeRO-3, which of them stay whole, and what a checkpoint writes follow from shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod
from typing import NamedTuple

from lrscale.plan.model_dims import Experts, ModelDims


class TensorShape(NamedTuple):
    """One parameter."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)


@cache
def model_tensors(dims: ModelDims) -> tuple[TensorShape, ...]:
    """What `named_parameters()` lists: a tied head is left out."""
    return tuple(_gpt2(dims) if dims.learned_positions else _llama(dims))


@cache
def projector_tensors(dims: ModelDims, layers: int, kind: str) -> tuple[TensorShape, ...]:
    """`lrscale.latent.projector.ReasoningProjector`: copies of the last MLP, and the gain of the kinds with norms."""
    prefix = "reasoning_projector."
    found = [TensorShape(f"{prefix}gain", (dims.hidden,))] if kind != "paper" else []
    for index in range(layers):
        found += (_gpt2_mlp if dims.learned_positions else _mlp)(dims, f"{prefix}{index}.", dims.intermediate)
    return tuple(found)


def _llama(dims: ModelDims) -> Iterator[TensorShape]:
    H, D = dims.hidden, dims.head_dim
    yield TensorShape("model.embed_tokens.weight", (dims.vocabulary, H))
    rows = {"q": D * dims.heads, "k": D * dims.kv_heads, "v": D * dims.kv_heads}
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for layer in range(dims.layers):
        prefix = f"model.layers.{layer}."
        for name, count in rows.items():
            yield TensorShape(f"{prefix}self_attn.{name}_proj.weight", (count, H))
            if "qkv" in dims.biases:
                yield TensorShape(f"{prefix}self_attn.{name}_proj.bias", (count,))
        yield TensorShape(f"{prefix}self_attn.o_proj.weight", (H, rows["q"]))
        if "o" in dims.biases:
            yield TensorShape(f"{prefix}self_attn.o_proj.bias", (H,))
        if dims.head_norms:
            yield from (TensorShape(f"{prefix}self_attn.{name}_norm.weight", (D,)) for name in "qk")
        if dims.experts is None or layer in dims.experts.dense_layers:
            yield from _mlp(dims, f"{prefix}mlp.", dims.intermediate)
        else:
            yield from _moe(dims, dims.experts, f"{prefix}mlp.")
        yield from (TensorShape(f"{prefix}{name}.weight", (H,)) for name in norms[: dims.norms])
    yield TensorShape("model.norm.weight", (H,))
    if not dims.tied:
        yield TensorShape("lm_head.weight", (dims.vocabulary, H))


def _mlp(dims: ModelDims, prefix: str, width: int) -> Iterator[TensorShape]:
    for name, shape in (("gate", (width, dims.hidden)), ("up", (width, dims.hidden)), ("down", (dims.hidden, width))):
        yield TensorShape(f"{prefix}{name}_proj.weight", shape)
        if "mlp" in dims.biases:
            yield TensorShape(f"{prefix}{name}_proj.bias", shape[:1])


def _moe(dims: ModelDims, experts: Experts, prefix: str) -> Iterator[TensorShape]:
    """transformers 5 keeps the experts of a layer in two tensors."""
    H, width = dims.hidden, experts.intermediate
    yield TensorShape(f"{prefix}experts.gate_up_proj", (experts.count, 2 * width, H))
    yield TensorShape(f"{prefix}experts.down_proj", (experts.count, H, width))
    yield TensorShape(f"{prefix}gate.weight", (experts.count, H))
    if experts.shared_intermediate:
        yield from _mlp(dims, f"{prefix}shared_expert.", experts.shared_intermediate)
        yield TensorShape(f"{prefix}shared_expert_gate.weight", (1, H))


def _gpt2(dims: ModelDims) -> Iterator[TensorShape]:
    H = dims.hidden
    yield TensorShape("transformer.wte.weight", (dims.vocabulary, H))
    yield TensorShape("transformer.wpe.weight", (dims.learned_positions, H))
    for layer in range(dims.layers):
        prefix = f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            yield from (TensorShape(f"{prefix}{norm}.{part}", (H,)) for part in ("weight", "bias"))
        for name, columns in (("c_attn", 3 * H), ("c_proj", H)):
            yield TensorShape(f"{prefix}attn.{name}.weight", (H, columns))
            yield TensorShape(f"{prefix}attn.{name}.bias", (columns,))
        yield from _gpt2_mlp(dims, f"{prefix}mlp.", dims.intermediate)
    yield from (TensorShape(f"transformer.ln_f.{part}", (H,)) for part in ("weight", "bias"))
    if not dims.tied:
        yield TensorShape("lm_head.weight", (dims.vocabulary, H))


def _gpt2_mlp(dims: ModelDims, prefix: str, width: int) -> Iterator[TensorShape]:
    for name, rows, columns in (("c_fc", dims.hidden, width), ("c_proj", width, dims.hidden)):
        yield TensorShape(f"{prefix}{name}.weight", (rows, columns))
        yield TensorShape(f"{prefix}{name}.bias", (columns,))
