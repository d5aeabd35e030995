"""Advantages relative to the group: what a sample earned beside the other samples of its prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]

STD_EPS = 1e-4
"""Added to the standard deviation, as TRL's GRPO does: bounds the advantages of nearly equal groups."""


def group_advantages(rewards_PG: Tensor, valid_PG: Tensor, kind: AdvantageKind) -> Tensor:
    """Advantages [P, G] from rewards [P, G]; computed in float64, returned in the rewards' dtype.

    `grpo`: (r - mean) / (std + 1e-4) with the sample standard deviation (n - 1), as TRL computes
    GRPO (arXiv 2402.03300). `dr_grpo`: r - mean (arXiv 2503.20783). `rloo`: r - mean of the
    other samples (arXiv 2402.14740).

    valid_PG [P, G] bool: False where scoring failed. Those samples enter no mean and no
    deviation, whatever their reward reads (NaN included), and get 0. A group without signal
    (fewer than two valid samples, or all valid rewards equal) gets 0 throughout.

    Raises ValueError on unequal shapes, an unknown kind, or a valid reward that is not finite.
    """
    rewards64_PG, valid_PG = _checked(rewards_PG, valid_PG)
    count_P1 = valid_PG.sum(dim=1, keepdim=True).to(torch.float64)
    mean_P1 = rewards64_PG.sum(dim=1, keepdim=True) / count_P1.clamp(min=1)
    centred_PG = torch.where(valid_PG, rewards64_PG - mean_P1, 0.0)
    others_P1 = (count_P1 - 1).clamp(min=1)
    if kind == "grpo":
        std_P1 = (centred_PG.square().sum(dim=1, keepdim=True) / others_P1).sqrt()
        advantages_PG = centred_PG / (std_P1 + STD_EPS)
    elif kind == "dr_grpo":
        advantages_PG = centred_PG
    elif kind == "rloo":
        advantages_PG = centred_PG * count_P1 / others_P1  # r - mean of the others = n / (n - 1) (r - mean)
    else:
        raise ValueError(f"advantage kind: given {kind!r}, allowed are 'grpo', 'dr_grpo', 'rloo'")
    signal_P = _has_signal(rewards64_PG, valid_PG)
    return torch.where(signal_P[:, None], advantages_PG, 0.0).to(rewards_PG.dtype)


def count_groups_without_signal(rewards_PG: Tensor, valid_PG: Tensor) -> int:
    """How many of the P groups teach nothing: fewer than two valid samples, or all valid rewards equal."""
    rewards64_PG, valid_PG = _checked(rewards_PG, valid_PG)
    return int((~_has_signal(rewards64_PG, valid_PG)).sum())


def _checked(rewards_PG: Tensor, valid_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards in float64 with 0 at invalid samples, and the mask as bool."""
    if rewards_PG.ndim != 2 or rewards_PG.shape != valid_PG.shape:
        raise ValueError(
            f"group_advantages needs rewards [P, G] and a mask of the same shape; "
            f"given {list(rewards_PG.shape)} and {list(valid_PG.shape)}"
        )
    valid_PG = valid_PG.bool()
    rewards64_PG = torch.where(valid_PG, rewards_PG.to(torch.float64), 0.0)
    if not bool(torch.isfinite(rewards64_PG).all()):
        prompt, sample = torch.nonzero(~torch.isfinite(rewards64_PG))[0].tolist()
        raise ValueError(
            f"reward of prompt {prompt}, sample {sample} is {float(rewards64_PG[prompt, sample])} but marked valid; "
            "a score that is not finite has failed: set its mask to False"
        )
    return rewards64_PG, valid_PG


def _has_signal(rewards64_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """[P] bool. Compares extremes, not the deviation: that of equal rewards such as 0.1 may round above 0."""
    highest_P = torch.where(valid_PG, rewards64_PG, -torch.inf).amax(dim=1)
    lowest_P = torch.where(valid_PG, rewards64_PG, torch.inf).amin(dim=1)
    return (valid_PG.sum(dim=1) >= 2) & (highest_P > lowest_P)
