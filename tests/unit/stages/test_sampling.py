"""Sampling, scoring, and the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from lrscale.config.reward import LengthPenaltyConfig
from lrscale.config.rollout import LocalRolloutConfig
from lrscale.latent import LatentPolicy
from lrscale.records import Prompt, Rollout, RolloutGroup, Score, ScoreFailed
from lrscale.report.timing import PhaseTimer
from lrscale.reward.rules import Shaping
from lrscale.reward.scorer import TaskScorer
from lrscale.rollout.engine import SamplingPlan
from lrscale.rollout.local import LocalRollouts
from lrscale.stages.evaluate import summarise
from lrscale.stages.prompts import PromptBook
from lrscale.stages.run_log import Display
from lrscale.stages.sampling import NonFiniteSampleError, Sampler, completion_markers, is_right, mean
from lrscale.stages.traces import kept_traces
from tests.unit.latent.tiny_models import live_policy


class Letters:
    """A task of single letters: right is a completion with an even number of characters."""

    def prompts(self, split: str, *, markers: bool) -> list[Prompt]:
        return [Prompt(f"{split}-{letter}", letter * 3) for letter in "abcd"]

    def score(self, prompt: Prompt, completion: str) -> Score:
        return Score(float(len(completion) % 2 == 0))

    def answered(self, completion: str) -> bool:
        return bool(completion)


class LastFirst(LocalRollouts):
    """Hands rollouts over in the opposite order, as an engine that finishes them in any order may."""

    def generate(
        self, prompts: Sequence[Sequence[int]], plan: SamplingPlan, **options
    ) -> Iterator[tuple[int, Rollout]]:
        yield from reversed(list(super().generate(prompts, plan, **options)))


class Diverged(LocalRollouts):
    """The third rollout holds a latent that is not a number."""

    def generate(
        self, prompts: Sequence[Sequence[int]], plan: SamplingPlan, **options
    ) -> Iterator[tuple[int, Rollout]]:
        for index, rollout in super().generate(prompts, plan, **options):
            broken = torch.full((1, 32), float("nan"))
            yield index, replace(rollout, latents_LH=broken) if index == 2 else rollout


@pytest.fixture(scope="module")
def policy() -> LatentPolicy:
    return live_policy(dtype=torch.float32)


def _sampler(policy: LatentPolicy, engine: type[LocalRollouts] = LocalRollouts) -> Sampler:
    task = Letters()
    return Sampler(
        engine(policy, LocalRolloutConfig(max_new_tokens=6)),
        TaskScorer(task.score, Shaping(LengthPenaltyConfig(price_per_100=50.0))),
        PromptBook(task, policy, chat_template=False),
        policy,
        Display(show=False),
    )


def test_groups_keep_their_order_whatever_finishes_first(policy: LatentPolicy):
    """Rewards of one prompt credited to another would still train, to nothing."""
    plan = SamplingPlan(seed=1)
    prompts = Letters().prompts("train", markers=False)
    straight = _sampler(policy).groups(prompts, 2, plan, PhaseTimer())
    turned = _sampler(policy, LastFirst).groups(prompts, 2, plan, PhaseTimer())
    for a, b in zip(straight, turned, strict=True):
        assert a.prompt.prompt_id == b.prompt.prompt_id
        assert [r.completion_ids for r in a.rollouts] == [r.completion_ids for r in b.rollouts]
        assert a.scores == b.scores
        assert all(bytes(r.prompt_ids).startswith(bytes(a.rollouts[0].prompt_ids[:1])) for r in a.rollouts)
    assert len({rollout.completion_ids for group in straight for rollout in group.rollouts}) == 8


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_sample(policy: LatentPolicy):
    """The reference sets them to 0 in silence."""
    with pytest.raises(NonFiniteSampleError, match="prompt train-b, sample 0"):
        _sampler(policy, Diverged).groups(Letters().prompts("train", markers=False), 2, SamplingPlan(1), PhaseTimer())


def test_the_price_of_length_decides_neither_accuracy_nor_traces(policy: LatentPolicy):
    """With a price of 50 a token a right answer may earn less than 0: it is right all the same."""
    groups = _sampler(policy).groups(Letters().prompts("train", markers=False), 4, SamplingPlan(3), PhaseTimer())
    scores = [score for group in groups for score in group.scores]
    right = [score for score in scores if is_right(score)]
    assert right and all(isinstance(score, Score) and score.value < 1 for score in right)
    assert len(kept_traces(groups)) == len(right)
    assert all(trace.reward == 1.0 for trace in kept_traces(groups))


def test_markers_count_whether_or_not_steps_follow(policy: LatentPolicy):
    """The zero-latent arm writes markers too; one that ends the prompt takes its steps in the completion."""
    marker = tuple(policy.marker_ids(3))
    letters = tuple(policy.encode("ab"))
    rollout = Rollout(letters, (*marker, *letters), torch.zeros(5), (), torch.zeros(0, 32), 0, "stop")
    assert completion_markers(policy, rollout) == [3]
    at_end = Rollout((*letters, *marker), letters, torch.zeros(2), (), torch.zeros(0, 32), 0, "stop")
    assert completion_markers(policy, at_end) == [3]
    inside = Rollout((*marker, *letters), letters, torch.zeros(2), (), torch.zeros(0, 32), 0, "stop")
    assert completion_markers(policy, inside) == []


def test_failed_scores_and_repeated_samples_in_an_evaluation(policy: LatentPolicy):
    """A failure is no wrong answer, and four samples of a prompt are not four prompts."""
    sampler = _sampler(policy)
    rollout = policy.generate(["a"], max_new_tokens=3)[0]
    prompt = Prompt("p", "a")
    failed = ScoreFailed("error", "x")
    groups = [
        RolloutGroup(prompt, (rollout,) * 2, (Score(1.0), failed)),
        RolloutGroup(prompt, (rollout,) * 2, (Score(0.0), Score(1.0))),
        RolloutGroup(prompt, (rollout,) * 2, (failed, failed)),
    ]
    figures = summarise(sampler, groups)
    assert figures["accuracy"] == pytest.approx(0.75) and figures["scores_failed"] == 3
    once = summarise(sampler, [RolloutGroup(prompt, (rollout,), (Score(1.0),))] * 4)
    often = summarise(sampler, [RolloutGroup(prompt, (rollout,) * 8, (Score(1.0),) * 8)] * 4)
    assert often["accuracy_low"] == once["accuracy_low"]


def test_nothing_to_average_is_null_not_zero():
    assert mean([]) is None and mean([1, 3]) == 2
