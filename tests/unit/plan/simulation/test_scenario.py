"""What cannot be simulated is refused with what to do; and lengths are what they are said to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from lrscale.plan.lengths import Lengths
from lrscale.plan.simulation.lengths import (
    AssumedLengths,
    Completion,
    InLatents,
    InWords,
    LatentForm,
    MeasuredLengths,
    mean_completion,
)
from lrscale.plan.simulation.run import simulate_run
from lrscale.plan.simulation.scenario import Failures, LognormalLatency, Scenario, Scoring
from lrscale.plan.simulation.splits import few_steps, split_time, split_times, steady_step_s
from tests.unit.plan.simulation.scenarios import COSTS, fixed, scenario


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Failures(per_node_day=-0.1), "needed 0 or more"),
        (lambda: Failures(detect_s=-1.0), "to detect"),
        (lambda: scenario(train_nodes=0), "train_nodes is 0, needed at least 1"),
        (lambda: scenario(placement="split"), "at least 1 node that generates"),
        (lambda: scenario(generate_nodes=2), "no nodes of their own"),
        (lambda: scenario(schedule="one_step_off"), "needs nodes for each"),
        (lambda: scenario(engines=0), "engines is 0"),
        (lambda: scenario(steps=0), "steps is 0"),
        (lambda: scenario(time_limit_s=10.0), "no step would ever be done"),
        (lambda: Scoring(0), "0 workers"),
        (lambda: LognormalLatency(-1.0), "needed at least 0"),
        (lambda: replace(COSTS, max_rows=0), "KV memory is too small"),
        (lambda: replace(COSTS, publish_s=-1.0), "publish_s below 0"),
        (lambda: replace(COSTS, prefill_tokens_per_s=0.0), "above 0"),
        (lambda: MeasuredLengths((), "runs/x"), "runs/x holds no completion"),
        (lambda: MeasuredLengths((Completion(0, 0),)), "cannot be"),
        (lambda: AssumedLengths(Lengths(0.0, 100, 0.6)), "a mean above 0"),
        (lambda: AssumedLengths(Lengths(float("nan"), 100, 0.6)), "a mean above 0"),
        (lambda: AssumedLengths(Lengths(50.0, 100, 0.6), 1.0), "a share of 0 up to 1"),
        (lambda: LatentForm(0.0, 5, 20, 12), "above 0"),
        (lambda: InLatents(fixed(10), LatentForm(0.2, 5, 20, 12), 1.5), "0 to 1"),
        (lambda: split_times(lambda count: scenario(), []), "at least 2"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_assumed_lengths_have_the_mean_that_was_asked_for() -> None:
    """Locks out the median taken for the mean, and a mean that the cut takes away."""
    tokens, latents = mean_completion(AssumedLengths(Lengths(500.0, 700, spread=0.8), 0.2), draws=20_000)
    assert (tokens, latents) == (pytest.approx(400.0, rel=0.02), pytest.approx(100.0, rel=0.02))
    drawn = [AssumedLengths(Lengths(500.0, 600, spread=0.8)).draw(Random(seed)) for seed in range(200)]
    assert max(one.positions for one in drawn) == 600


def test_latents_take_the_place_of_sentences_and_back() -> None:
    """400 tokens in sentences of 20: five of twenty become a marker of 3 tokens and int(0.2 x 20) steps each."""
    form = LatentForm(token_ratio=0.2, max_steps=5, sentence_tokens=20, marker_tokens=3)
    latent = form.in_latents(Completion(400, 0), 0.25)
    assert latent == Completion(300 + 5 * 3, 5 * 4)
    assert form.in_words(latent) == Completion(400, 0)
    assert InLatents(fixed(400), form, 0.25).draw(Random(0)) == latent
    assert InWords(MeasuredLengths((latent,)), form, limit=390).draw(Random(0)) == Completion(390, 0)
    shorter = MeasuredLengths((Completion(300, 100),), limit=200)
    assert shorter.draw(Random(0)) == Completion(150, 50), "longer than the planned run lets it become"


@pytest.mark.parametrize("nodes", [4, 60])
def test_the_best_split_is_found(nodes: int) -> None:
    """Among all of them and by either schedule, though with many nodes only some are tried."""

    def build(generate_nodes: int) -> Scenario:
        if generate_nodes == 3:
            raise ValueError("does not divide")
        train_nodes = nodes - generate_nodes
        costs = replace(COSTS, update_s_per_token=0.05 / train_nodes, logprob_s_per_token=0.0)
        return scenario(
            engines=generate_nodes, costs=costs, placement="split",
            generate_nodes=generate_nodes, train_nodes=train_nodes,
        )  # fmt: skip

    tried = split_times(build, range(1, nodes))
    assert len(tried) == 3 if nodes == 4 else len(tried) < 45
    everything = [split_time(build, count) for count in range(1, nodes)]
    for schedule in ("step_s", "one_step_off_s"):
        seconds = [[getattr(split, schedule) for split in splits] for splits in (tried, everything)]
        assert min(seconds[0]) <= 1.03 * min(seconds[1])
    assert all(split.one_step_off_s <= split.step_s for split in everything)
    assert [split.reason for split in tried if split.generate_nodes == 3] in ([], ["does not divide"])


@pytest.mark.parametrize("changes", [{}, {"placement": "split", "generate_nodes": 2, "schedule": "one_step_off"}])
def test_a_steady_step_is_that_of_a_long_run(changes: dict[str, object]) -> None:
    """Locks out a refresh or a checkpoint that counts in full where generation hides it, or not at all."""
    costs = replace(COSTS, refresh_s=12.0, checkpoint_s=5.0)
    some = scenario(steps=240, costs=costs, checkpoint_every=6, **changes)
    steady_s = steady_step_s(some, few_steps(some))
    assert steady_s == pytest.approx(simulate_run(some, seed=0, detailed_steps=60).step_s, rel=0.03)
