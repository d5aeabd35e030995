"""Rollouts that wait for scores: taken up again only where all that decided them is the same."""

from __future__ import annotations

from pathlib import Path

import torch

from lrscale.records import LatentSpan, Rollout, Score, ScoreFailed
from lrscale.stages.exchange import Sample
from lrscale.stages.pending import PendingRollouts

STEP = {"name": "rl latent 3", "version": 2}


def rollout(seed: int) -> Rollout:
    draw = torch.Generator().manual_seed(seed)
    return Rollout(
        (1, 2),
        (seed, 4, 5),
        torch.rand(3, generator=draw),
        (LatentSpan(2, 2),),
        torch.rand(2, 8, generator=draw),
        2,
        "stop",
    )


def kept(folder: Path) -> PendingRollouts:
    pending = PendingRollouts(folder, rank=1)
    samples = {
        7: Sample(rollout(7), Score(0.25, {"task": 0.25})),
        8: Sample(rollout(8), ScoreFailed("error", "x")),
        9: Sample(rollout(9), None),
    }
    pending.keep(STEP, "a" * 64, samples)
    return pending


def test_rollouts_come_back_bit_for_bit_and_failures_are_tried_again(tmp_path: Path) -> None:
    """A failure that was kept would stay a failure after its cause is mended."""
    found = kept(tmp_path).load(STEP, "a" * 64)
    assert [found[index].score for index in (7, 8, 9)] == [Score(0.25, {"task": 0.25}), None, None]
    for index, sample in found.items():
        assert sample.rollout.completion_ids == rollout(index).completion_ids
        assert torch.equal(sample.rollout.latents_LH, rollout(index).latents_LH)
        assert torch.equal(sample.rollout.logprobs_T, rollout(index).logprobs_T)


def test_another_step_another_rank_another_reward(tmp_path: Path) -> None:
    """Rollouts of other weights would train in silence; scores of an old reward would mix with the new one's."""
    pending = kept(tmp_path)
    assert pending.load({**STEP, "version": 3}, "a" * 64) == {}
    assert PendingRollouts(tmp_path, rank=0).load(STEP, "a" * 64) == {}
    other = pending.load(STEP, "b" * 64)
    assert len(other) == 3 and all(sample.score is None for sample in other.values())


def test_what_is_scored_is_cleared_and_what_is_ahead_waits(tmp_path: Path) -> None:
    """A run that goes on from an earlier checkpoint passes other steps first."""
    pending = kept(tmp_path)
    pending.clear({**STEP, "name": "rl latent 2"})
    assert len(pending.load(STEP, "a" * 64)) == 3
    pending.keep({**STEP, "name": "rl latent 4"}, "a" * 64, {0: Sample(rollout(0), None)})
    assert len(list(tmp_path.iterdir())) == 1, "the folder does not grow"
    pending.clear({**STEP, "name": "rl latent 4"})
    assert not list(tmp_path.iterdir())
    PendingRollouts().keep(STEP, "a", {0: Sample(rollout(0), None)})
