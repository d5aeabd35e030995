"""Decoding with the trained policy."""

from __future__ import annotations

import torch

from lrscale.config.rollout import LocalRolloutConfig
from lrscale.latent import LatentPolicy
from lrscale.rollout.engine import SamplingPlan
from lrscale.rollout.local import LocalRollouts
from tests.unit.latent.tiny_models import live_policy


def _prompts(policy: LatentPolicy, count: int) -> list[list[int]]:
    return [[*policy.encode(f"row {index} "), *policy.marker_ids(1 + index % 3)] for index in range(count)]


def test_rollouts_carry_the_version_of_the_published_weights():
    """Stale rollouts would pass for fresh ones if the version stood still."""
    rollouts = LocalRollouts(live_policy(dtype=torch.float32), LocalRolloutConfig(max_new_tokens=4))
    rollouts.load_weights(iter(()), version=7)
    found = dict(rollouts.generate(_prompts(rollouts.policy, 2), SamplingPlan(seed=1)))
    assert {rollout.policy_version for rollout in found.values()} == {7}


def test_a_plan_decides_every_token():
    rollouts = LocalRollouts(live_policy(dtype=torch.float32), LocalRolloutConfig(max_new_tokens=8))
    prompts = _prompts(rollouts.policy, 3)
    first = dict(rollouts.generate(prompts, SamplingPlan(seed=1)))
    again = dict(rollouts.generate(prompts, SamplingPlan(seed=1)))
    other = dict(rollouts.generate(prompts, SamplingPlan(seed=2)))
    assert [first[i].completion_ids for i in range(3)] == [again[i].completion_ids for i in range(3)]
    assert [first[i].completion_ids for i in range(3)] != [other[i].completion_ids for i in range(3)]


def test_shuffled_latents_never_leave_a_row_alone():
    """A last batch of one row, or one row that outlives the others, has nobody to swap latents with: it crashed."""
    policy = live_policy(dtype=torch.float32)
    rollouts = LocalRollouts(policy, LocalRolloutConfig(max_new_tokens=12, batch_rows=4))
    found = dict(rollouts.generate(_prompts(policy, 5), SamplingPlan(seed=3, mode="shuffled")))
    assert len(found) == 5

    marker = policy.marker_ids(32)
    stops = [policy.tokenizer.eos_token_id]
    lengths = [
        rollout.length
        for rollout in policy.generate(
            [policy.encode("a"), policy.encode("b"), [*policy.encode("c"), *marker]],
            max_new_tokens=40,
            mode="shuffled",
            stop_ids=[*range(0, 250), *stops],  # text rows stop at once, the latent row goes on alone
        )
    ]
    assert lengths[2] > 32 and max(lengths[:2]) < 32
