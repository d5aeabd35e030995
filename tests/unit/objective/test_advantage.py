"""group_advantages against a plain loop; failed scores and groups without signal."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrscale.objective import count_groups_without_signal, group_advantages

KINDS = ("grpo", "dr_grpo", "rloo")


def plain_loop(rewards, valid, kind):
    rows = []
    for rewards_G, valid_G in zip(rewards, valid, strict=True):
        good = [reward for reward, ok in zip(rewards_G, valid_G, strict=True) if ok]
        row = []
        for index, (reward, ok) in enumerate(zip(rewards_G, valid_G, strict=True)):
            if not ok or len(good) < 2 or len(set(good)) == 1:
                row.append(0.0)
            elif kind == "grpo":
                row.append((reward - statistics.fmean(good)) / (statistics.stdev(good) + 1e-4))
            elif kind == "dr_grpo":
                row.append(reward - statistics.fmean(good))
            else:
                others = [r for j, r in enumerate(rewards_G) if valid_G[j] and j != index]
                row.append(reward - statistics.fmean(others))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_equals_plain_loop(data, kind):
    """Locks out a mean or deviation that counts failed samples."""
    prompts, samples = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    reward = st.sampled_from([0.0, 0.1, 1.0, -2.5, 0.3])
    rewards = [[data.draw(reward) for _ in range(samples)] for _ in range(prompts)]
    valid = [[data.draw(st.booleans()) for _ in range(samples)] for _ in range(prompts)]
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(valid), kind)
    torch.testing.assert_close(got, plain_loop(rewards, valid, kind), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_failed_samples_do_not_move_the_others(kind):
    """Locks out a failed score that acts as 0 (or a NaN that spreads over its group)."""
    whole = group_advantages(torch.tensor([[1.0, 0.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool), kind)
    holed = group_advantages(
        torch.tensor([[1.0, math.nan, 0.0, 1.0, math.inf]]), torch.tensor([[True, False, True, True, False]]), kind
    )
    assert holed[0, [0, 2, 3]].tolist() == whole[0].tolist()
    assert holed[0, [1, 4]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_without_signal_get_zero_and_are_counted(kind):
    """Locks out advantages of +-1 made from the rounding error of equal rewards (0.1 is not exact)."""
    rewards_PG = torch.tensor([[0.1] * 7, [0.0, 1.0] + [0.0] * 5, [1.0] + [0.0] * 6])
    valid_PG = torch.ones(3, 7, dtype=torch.bool)
    valid_PG[2, 1:] = False
    advantages_PG = group_advantages(rewards_PG, valid_PG, kind)
    assert advantages_PG[0].eq(0).all() and advantages_PG[2].eq(0).all()
    assert advantages_PG[1].ne(0).all()
    assert count_groups_without_signal(rewards_PG, valid_PG) == 2


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match="prompt 0, sample 1"):
        group_advantages(torch.tensor([[1.0, math.nan]]), torch.tensor([[True, True]]), "grpo")
    with pytest.raises(ValueError, match="allowed are"):
        group_advantages(torch.tensor([[1.0, 0.0]]), torch.tensor([[True, True]]), "ppo")
    with pytest.raises(ValueError, match="same shape"):
        group_advantages(torch.zeros(2, 3), torch.ones(3, 2), "grpo")
