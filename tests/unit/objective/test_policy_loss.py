"""policy_loss against the plainest loop, and that micro-batches add up exactly (float64)."""

import dataclasses
import math

import pytest
import torch

from lrscale.config.stages import RlConfig
from lrscale.objective import PolicyObjective, loss_normaliser, policy_loss
from lrscale.records import TrainBatch

B, T = 5, 9


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)

    def draw(scale=1.0):
        return scale * torch.randn(B, T, generator=generator, dtype=torch.float64)

    base = draw() - 3
    mask = (torch.rand(B, T, generator=generator) < 0.6).double()
    mask[4] = 0  # a row without actions
    batch = TrainBatch(
        input_ids_BT=torch.zeros(B, T, dtype=torch.long),
        attention_mask_BT=torch.ones(B, T, dtype=torch.long),
        action_mask_BT=mask,
        old_logprobs_BT=torch.where(mask.bool(), base, -math.inf),
        advantages_B=torch.tensor([1.0, -0.5, 2.0, 0.0, 1.0], dtype=torch.float64),
        latents=(),
    )
    return batch, base + draw(0.4), base + draw(0.1), base + draw(0.3)


OBJECTIVES = [
    PolicyObjective(),
    PolicyObjective(clip_low=0.1, clip_high=0.4, kl_coefficient=0.3, kl_estimator="k3"),
    PolicyObjective(kl_coefficient=0.3, kl_estimator="k2", correction_cap=1.05),
    PolicyObjective(kl_coefficient=0.3, kl_estimator="k1"),
]


def plain_loop(logprobs, batch, objective, normaliser, recomputed, reference):
    total, clipped = torch.zeros((), dtype=torch.float64), 0
    for row in range(B):
        advantage = float(batch.advantages_B[row])
        for t in range(T):
            if not batch.action_mask_BT[row, t]:
                continue
            rollout = float(batch.old_logprobs_BT[row, t])
            old = float(recomputed[row, t]) if recomputed is not None else rollout
            ratio = (logprobs[row, t] - old).exp()
            low, high = 1 - objective.clip_low, 1 + objective.clip_high
            ratio_value = float(ratio.detach())
            bounded = min(max(ratio_value, low), high)
            if ratio_value * advantage > bounded * advantage:
                surrogate = torch.tensor(bounded * advantage, dtype=torch.float64)
                clipped += 1
            else:
                surrogate = ratio * advantage
            weight = min(objective.correction_cap, math.exp(old - rollout)) if objective.correction_cap else 1.0
            term = -weight * surrogate
            if objective.kl_coefficient:
                d = logprobs[row, t] - float(reference[row, t])
                kl = {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[objective.kl_estimator]
                term = term + objective.kl_coefficient * kl
            total = total + term
    return total / normaliser, clipped


def run(case, objective, normaliser, rows=slice(None)):
    batch, logprobs, recomputed, reference = case
    leaf = logprobs.clone().requires_grad_()
    part = dataclasses.replace(
        batch,
        **{f: getattr(batch, f)[rows] for f in ("input_ids_BT", "attention_mask_BT", "action_mask_BT")},
        old_logprobs_BT=batch.old_logprobs_BT[rows],
        advantages_B=batch.advantages_B[rows],
    )
    result = policy_loss(
        leaf[rows],
        part,
        objective,
        normaliser=normaliser,
        recomputed_BT=recomputed[rows] if objective.correction_cap else None,
        reference_BT=reference[rows] if objective.kl_coefficient else None,
    )
    result.loss.backward()
    return result, leaf.grad


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_plain_loop(case, objective):
    """Locks out swapped clip sides, a correction with a gradient, padding that leaks in (old is -inf there)."""
    batch, logprobs, recomputed, reference = case
    result, grad = run(case, objective, 17.0)
    leaf = logprobs.clone().requires_grad_()
    loss, clipped = plain_loop(
        leaf, batch, objective, 17.0, recomputed if objective.correction_cap else None, reference
    )
    loss.backward()
    torch.testing.assert_close(result.loss, loss, rtol=1e-12, atol=1e-14)
    if objective.kl_estimator != "k1":  # k1 takes its gradient from k2 on purpose
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-12, atol=1e-14)
    assert clipped > 0
    assert int(result.stats.clipped_tokens) == clipped
    assert int(result.stats.tokens) == int(batch.action_mask_BT.sum())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_add_up(case, objective):
    """Locks out a per-micro-batch mean: any split into micro-batches gives the same loss, gradient and sums."""
    whole, whole_grad = run(case, objective, 17.0)
    loss, grad, stats = 0.0, torch.zeros_like(whole_grad), None
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        part, part_grad = run(case, objective, torch.tensor(17.0), rows)
        loss, grad = loss + part.loss.detach(), grad + part_grad
        stats = part.stats if stats is None else stats + part.stats
    torch.testing.assert_close(loss, whole.loss.detach(), rtol=1e-12, atol=1e-14)
    assert torch.equal(grad, whole_grad)
    for name in PolicyStatsNames:
        torch.testing.assert_close(getattr(stats, name), getattr(whole.stats, name), rtol=1e-12, atol=1e-14)


PolicyStatsNames = ("tokens", "clipped_tokens", "kl_sum", "gap_sum", "gap_max", "correction_sum")


def test_first_update_has_plain_policy_gradient(case):
    """Locks out a wrong sign or scale: at ratio 1 the gradient is -A / normaliser at every action token."""
    batch, *_ = case
    leaf = torch.where(batch.action_mask_BT.bool(), batch.old_logprobs_BT, 0.0).requires_grad_()
    result = policy_loss(leaf, batch, PolicyObjective(), normaliser=4.0)
    result.loss.backward()
    torch.testing.assert_close(leaf.grad, -batch.advantages_B[:, None] * batch.action_mask_BT / 4.0)
    assert result.stats.clip_share == 0 and result.stats.logprob_gap_max == 0


def test_k1_gradient_regularises(case):
    """Locks out k1 differentiated as it stands: its gradient ignores the reference altogether."""
    objective = PolicyObjective(kl_coefficient=0.3, kl_estimator="k1")
    twin = PolicyObjective(kl_coefficient=0.3, kl_estimator="k2")
    assert torch.equal(run(case, objective, 17.0)[1], run(case, twin, 17.0)[1])


def test_masked_garbage_gives_no_nan(case):
    """Locks out 0 x inf: NaN and inf at masked tokens leave loss and gradient finite."""
    batch, logprobs, *_ = case
    garbage = torch.where(batch.action_mask_BT.bool(), logprobs, math.nan).requires_grad_()
    result = policy_loss(garbage, batch, PolicyObjective(), normaliser=1.0)
    result.loss.backward()
    assert torch.isfinite(result.loss) and torch.isfinite(garbage.grad).all()
    assert math.isfinite(result.stats.logprob_gap_max)


def test_missing_parts_are_named(case):
    batch, logprobs, *_ = case
    with pytest.raises(ValueError, match="reference"):
        policy_loss(logprobs, batch, PolicyObjective(kl_coefficient=0.1), normaliser=1.0)
    with pytest.raises(ValueError, match="recomputed"):
        policy_loss(logprobs, batch, PolicyObjective(correction_cap=2.0), normaliser=1.0)
    with pytest.raises(ValueError, match="normaliser"):
        policy_loss(logprobs, batch, PolicyObjective(), normaliser=0.0)
    with pytest.raises(ValueError, match="same shape"):
        policy_loss(logprobs[:, 1:], batch, PolicyObjective(), normaliser=1.0)


def test_recipe_values_arrive():
    """Locks out low and high clip mixed up on the way from the recipe."""
    config = RlConfig.model_validate(
        {
            "clip_low": 0.1,
            "clip_high": 0.3,
            "kl": {"coefficient": 0.01, "estimator": "k2"},
            "importance": {"old_logprobs": "recomputed", "correction_cap": 2.0},
        }
    )
    assert PolicyObjective.from_config(config) == PolicyObjective(0.1, 0.3, 0.01, "k2", 2.0)


def test_normalisers():
    """Locks out Dr. GRPO divided by the tokens really written, which is the bias it removes."""
    assert loss_normaliser("grpo", action_tokens=321, sequences=4, max_new_tokens=100) == 321
    assert loss_normaliser("dr_grpo", action_tokens=321, sequences=4, max_new_tokens=100) == 400
    assert loss_normaliser("rloo", action_tokens=0, sequences=0, max_new_tokens=100) == 1
