"""The clipped surrogate on discrete tokens, normalised over the whole update.

    ratio  r = exp(logp - old)            logp: trained policy; old: rollout, or recomputed before the update
    weight w = min(cap, exp(old - rollout)), constant; 1 where the correction is off
    loss     = sum over action tokens [ -w min(r A, clip(r, 1 - low, 1 + high) A) + beta KL ] / normaliser

The normaliser covers every micro-batch and rank of the update, so that losses and gradients of
micro-batches simply add up, however the rows were split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lrscale.config.stages import RlConfig
from lrscale.objective.advantage import AdvantageKind
from lrscale.records import TrainBatch

KlEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """What the loss is made of."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    kl_estimator: KlEstimator = "k3"
    correction_cap: float = 0.0
    """Cap of the importance weight; 0 switches the correction off."""

    @classmethod
    def from_config(cls, config: RlConfig) -> PolicyObjective:
        return cls(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_coefficient=config.kl.coefficient,
            kl_estimator=config.kl.estimator,
            correction_cap=config.importance.correction_cap,
        )


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """Sums over action tokens, as 0-dimensional float64 tensors: adding micro-batches up is exact."""

    tokens: Tensor
    clipped_tokens: Tensor
    """Tokens whose ratio lies where the clip takes the gradient away."""
    kl_sum: Tensor
    """Sum of the KL estimates to the reference; 0 without one."""
    gap_sum: Tensor
    """Sum of |trainer - rollout| log-probabilities."""
    gap_max: Tensor
    correction_sum: Tensor
    """Sum of the importance weights; equals `tokens` where the correction is off."""

    def __add__(self, other: PolicyStats) -> PolicyStats:
        return PolicyStats(
            tokens=self.tokens + other.tokens,
            clipped_tokens=self.clipped_tokens + other.clipped_tokens,
            kl_sum=self.kl_sum + other.kl_sum,
            gap_sum=self.gap_sum + other.gap_sum,
            gap_max=torch.maximum(self.gap_max, other.gap_max),
            correction_sum=self.correction_sum + other.correction_sum,
        )

    @classmethod
    def zero(cls, device: torch.device) -> PolicyStats:
        """No tokens at all: where adding up starts."""
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        return cls(nothing, nothing, nothing, nothing, nothing, nothing)

    @property
    def clip_share(self) -> float:
        return self._mean(self.clipped_tokens)

    @property
    def kl(self) -> float:
        return self._mean(self.kl_sum)

    @property
    def logprob_gap_mean(self) -> float:
        return self._mean(self.gap_sum)

    @property
    def logprob_gap_max(self) -> float:
        return float(self.gap_max)

    @property
    def correction_mean(self) -> float:
        return self._mean(self.correction_sum)

    def _mean(self, total: Tensor) -> float:
        return float(total / self.tokens.clamp(min=1))


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The micro-batch's share of the update's loss, and its sums."""

    loss: Tensor
    stats: PolicyStats


def loss_normaliser(kind: AdvantageKind, *, action_tokens: float, sequences: int, max_new_tokens: int) -> float:
    """What the update's summed loss is divided by, over all micro-batches and ranks.

    `grpo` and `rloo`: the update's action tokens. `dr_grpo`: valid sequences x max_new_tokens, a
    constant, so that long wrong answers are not favoured (arXiv 2503.20783). At least 1.
    """
    return max(1.0, float(sequences * max_new_tokens) if kind == "dr_grpo" else float(action_tokens))


def policy_loss(
    logprobs_BT: Tensor,
    batch: TrainBatch,
    objective: PolicyObjective,
    *,
    normaliser: float | Tensor,
    recomputed_BT: Tensor | None = None,
    reference_BT: Tensor | None = None,
) -> PolicyLoss:
    """Loss of a micro-batch, divided by the whole update's normaliser (see the module's text).

    logprobs_BT [B, T], with gradient: log-probability of token t given those before it.
    recomputed_BT [B, T]: the trainer's log-probs before the update (`old_logprobs: recomputed`);
    without it the rollout's own are the old ones. reference_BT [B, T]: the frozen reference's.
    Values where the action mask is 0 are never looked at, so they may be anything.

    The gap compares the rollout with recomputed_BT, or, without it, with logprobs_BT: the two
    engines differ only as long as no weight has moved since the rollout.

    Raises ValueError where shapes differ, the normaliser is not positive, or the objective asks
    for a KL term or a correction whose log-probs are missing.
    """
    _check(logprobs_BT, batch, objective, recomputed_BT, reference_BT)
    if not float(normaliser) > 0:
        raise ValueError(f"normaliser must be positive (the update's action tokens); given {float(normaliser)}")
    mask_BT = batch.action_mask_BT.bool()
    rollout_BT = batch.old_logprobs_BT.to(logprobs_BT.dtype)
    old_BT = rollout_BT if recomputed_BT is None else recomputed_BT.detach().to(logprobs_BT.dtype)
    advantages_B1 = batch.advantages_B.to(logprobs_BT.dtype)[:, None]

    # `where` before `exp`: a masked entry of -inf or NaN would otherwise survive the product with 0
    ratio_BT = torch.where(mask_BT, logprobs_BT - old_BT, 0.0).exp()
    clipped_BT = ratio_BT.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    surrogate_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)

    weight_BT = torch.ones_like(rollout_BT)
    if objective.correction_cap > 0:
        weight_BT = torch.where(mask_BT, old_BT - rollout_BT, 0.0).exp().clamp(max=objective.correction_cap)
    terms_BT = -weight_BT * surrogate_BT

    kl_BT = torch.zeros_like(rollout_BT)
    if reference_BT is not None:
        log_ratio_BT = torch.where(mask_BT, logprobs_BT - reference_BT.detach().to(logprobs_BT.dtype), 0.0)
        kl_BT = _kl(log_ratio_BT, objective.kl_estimator)
        if objective.kl_coefficient > 0:
            terms_BT = terms_BT + objective.kl_coefficient * kl_BT

    loss = torch.where(mask_BT, terms_BT, 0.0).sum() / normaliser
    with torch.no_grad():
        above_BT = (ratio_BT > 1 + objective.clip_high) & (advantages_B1 > 0)
        below_BT = (ratio_BT < 1 - objective.clip_low) & (advantages_B1 < 0)
        trainer_BT = logprobs_BT if recomputed_BT is None else old_BT
        gap_BT = torch.where(mask_BT, trainer_BT - rollout_BT, 0.0).abs()
        stats = PolicyStats(
            tokens=_total(mask_BT),
            clipped_tokens=_total((above_BT | below_BT) & mask_BT),
            kl_sum=_total(torch.where(mask_BT, kl_BT, 0.0)),
            gap_sum=_total(gap_BT),
            gap_max=gap_BT.max().to(torch.float64) if gap_BT.numel() else _total(gap_BT),
            correction_sum=_total(torch.where(mask_BT, weight_BT, 0.0)),
        )
    return PolicyLoss(loss=loss, stats=stats)


def _kl(log_ratio_BT: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimates of KL(policy || reference) a token from log p - log ref (Schulman, "Approximating KL divergence").

    `k2` and `k3` carry their own gradients. The gradient of `k1` is that of log p, which has
    mean zero and would regularise nothing; it therefore takes its value from k1 and its gradient
    from k2, whose expectation is the gradient of the KL divergence.
    """
    half_square_BT = 0.5 * log_ratio_BT.square()
    if estimator == "k1":
        return log_ratio_BT.detach() + (half_square_BT - half_square_BT.detach())
    if estimator == "k2":
        return half_square_BT
    if estimator == "k3":
        return torch.expm1(-log_ratio_BT) + log_ratio_BT
    raise ValueError(f"KL estimator: given {estimator!r}, allowed are 'k1', 'k2', 'k3'")


def _total(values: Tensor) -> Tensor:
    return values.detach().sum(dtype=torch.float64)


def _check(
    logprobs_BT: Tensor,
    batch: TrainBatch,
    objective: PolicyObjective,
    recomputed_BT: Tensor | None,
    reference_BT: Tensor | None,
) -> None:
    named = {
        "action_mask_BT": batch.action_mask_BT,
        "old_logprobs_BT": batch.old_logprobs_BT,
        "recomputed_BT": recomputed_BT,
        "reference_BT": reference_BT,
    }
    for name, value in named.items():
        if value is not None and value.shape != logprobs_BT.shape:
            raise ValueError(f"{name} is {list(value.shape)} but logprobs_BT is {list(logprobs_BT.shape)}: same shape")
    if batch.advantages_B.shape != logprobs_BT.shape[:1]:
        raise ValueError(f"advantages_B is {list(batch.advantages_B.shape)}: one a row of {list(logprobs_BT.shape)}")
    if objective.kl_coefficient > 0 and reference_BT is None:
        raise ValueError(f"kl.coefficient is {objective.kl_coefficient} but no reference log-probs were given")
    if objective.correction_cap > 0 and recomputed_BT is None:
        raise ValueError(
            f"correction_cap is {objective.correction_cap} but no recomputed log-probs were given: "
            "set old_logprobs: recomputed, or correction_cap: 0"
        )
