"""Drawing tokens from logits, each row from a random stream of its own.

A draw is a pure function of (seed, row key, position), so it does not depend on what else is in the
batch, nothing has to be stored to resume, and every device draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is drawn from the logits."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: given {self.temperature}, needed 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: given {self.top_p}, needed more than 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k: given {self.top_k}, needed 0 (all) or more")


def row_streams(seed: int, row_keys: Sequence[int], device: torch.device) -> Tensor:
    """[B] int64 states, one random stream a row."""
    base = _mix_int(seed + _GOLDEN)
    return torch.tensor([_signed(_mix_int(base + key * _GOLDEN)) for key in row_keys], dtype=torch.long, device=device)


def uniforms(streams_B: Tensor, position: int) -> Tensor:
    """[B] float64 in [0, 1): the draw number `position` of every stream (SplitMix64, Steele et al. 2014)."""
    z = streams_B + _signed((position + 1) * _GOLDEN)
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).double() * 2.0**-53


def draw(
    logits_BV: Tensor, uniform_B: Tensor, options: SamplingOptions, forbidden_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits_BV: [B, V].
        uniform_B: [B] float64 in [0, 1).
        forbidden_ids: ids that may not be drawn now (stop tokens before the minimum length).

    Returns:
        tokens [B], and their log-probabilities [B] under the full distribution at the temperature (at
        temperature 1 where it is 0): truncation by top-p, top-k or forbidden ids does not enter them,
        so they equal what a replay of the sequence computes.
    """
    wide_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    logprobs_BV = torch.log_softmax(wide_BV / (options.temperature or 1.0), dim=-1)
    weights_BV = logprobs_BV.exp()
    if forbidden_ids is not None:
        weights_BV = weights_BV.index_fill(1, forbidden_ids, 0.0)
    if options.temperature == 0:
        tokens_B = weights_BV.argmax(-1)
    else:
        tokens_B = _invert(_truncated(weights_BV, options), uniform_B)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1)


def _truncated(weights_BV: Tensor, options: SamplingOptions) -> Tensor:
    if 0 < options.top_k < weights_BV.shape[1]:
        kept = weights_BV.topk(options.top_k, dim=-1)
        weights_BV = torch.zeros_like(weights_BV).scatter(1, kept.indices, kept.values)
    if options.top_p < 1:
        sorted_BV, order_BV = weights_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        sorted_BV = sorted_BV.masked_fill(before_BV >= options.top_p * sorted_BV.sum(-1, keepdim=True), 0.0)
        weights_BV = torch.zeros_like(weights_BV).scatter(1, order_BV, sorted_BV)
    return weights_BV


def _invert(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    cumulative_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    total_B = cumulative_BV[:, -1]
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    tokens_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True).squeeze(1)
    return tokens_B.clamp(max=weights_BV.shape[1] - 1)  # past the end only for NaN, which the log-prob then shows


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 read as unsigned."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)
