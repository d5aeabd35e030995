"""A simulated run: nothing lost, nothing twice, and the closed form where there is one."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest

from lrscale.plan.simulation.run import simulate_run
from lrscale.plan.simulation.scenario import Failures, LognormalLatency, Scenario, Scoring
from tests.unit.plan.simulation.scenarios import COSTS, fixed, scenario

OFTEN = Failures(per_node_day=700.0, detect_s=10.0, requeue_s=30.0)
"""One in 31 s of the job: several a run."""
SPLIT = {"placement": "split", "generate_nodes": 2, "schedule": "one_step_off"}


@pytest.mark.parametrize("changes", [{}, SPLIT, {"continuous": False}, {"time_limit_s": 60.0}])
@pytest.mark.parametrize("failures", [Failures(), OFTEN])
@pytest.mark.parametrize("detailed", [None, 2])
def test_every_sequence_is_generated_scored_and_trained_on_once(
    changes: dict[str, object], failures: Failures, detailed: int | None
) -> None:
    """Locks out sequences that a failure drops, or that are counted before and after it; and seconds likewise."""
    run = simulate_run(scenario(failures=failures, **changes), seed=3, detailed_steps=detailed)
    assert sorted(run.ledger.steps) == list(range(1, 13))
    assert all(sequences.whole for sequences in run.ledger.steps.values())
    assert sum(run.ledger.phases.values()) == pytest.approx(run.seconds)
    assert (run.failures > 2, run.ledger.lost_sequences > 0) == (failures is OFTEN, failures is OFTEN)
    assert (run.drains > 0) == ("time_limit_s" in changes)
    assert all(0.0 < share <= 1.0 for share in run.utilisation().values())


def plain(**changes: object) -> Scenario:
    """No variance and no failures: everything by hand."""
    return scenario(lengths=fixed(100, 20), scoring=Scoring(8, LognormalLatency(2.0)), refresh_every=0, **changes)


def generation_s(rows: int = 16, prompts: int = 2) -> float:
    """Prefill of the prompts and 120 positions of the rows; by default of 64 sequences on 4 engines of 16 rows."""
    mean_context = 50 + (120 - 1) / 2
    return prompts * 50 / COSTS.prefill_tokens_per_s + 120 * COSTS.decode_s(rows, mean_context)


def test_without_variance_a_step_has_its_closed_form() -> None:
    """Locks out a batch whose cost is taken at the wrong size or context, and phases left out or counted twice."""
    run = simulate_run(plain(), seed=0)
    train_s = 64 * 170 * (1e-4 + 3e-4)
    score_s = 64 / 8 * 2.0  # all finish at once: eight rounds of the eight workers
    step_s = generation_s() + score_s + train_s + 1.0
    assert run.step_s == pytest.approx(step_s + 4.0 / 3)
    assert run.seconds == pytest.approx(20.0 + 12 * step_s + 4 * 4.0)
    assert run.utilisation()["train"] == pytest.approx(12 * train_s / run.seconds)


def test_latent_steps_are_decoded_like_tokens() -> None:
    """Locks out latents that cost no time, or that are not trained on."""
    with_latents = simulate_run(plain(), seed=0)
    same_positions = simulate_run(replace(plain(), lengths=fixed(120)), seed=0)
    assert with_latents.seconds == same_positions.seconds


def test_engines_that_hold_fewer_rows_decode_in_rounds() -> None:
    """Locks out a batch above max_rows; batch by batch and continuous are the same where all lengths are."""
    costs = replace(COSTS, max_rows=8)
    scored_at_once = Scoring(64, LognormalLatency(0.0))
    for continuous in (True, False):
        run = simulate_run(replace(plain(costs=costs, continuous=continuous), scoring=scored_at_once), seed=0)
        assert run.ledger.phases["rollout"] / 12 == pytest.approx(2 * generation_s(rows=8, prompts=1))


def test_refilling_at_once_beats_batch_by_batch() -> None:
    """Locks out engines that wait for the longest row of a batch before they take the next one."""
    costs = replace(COSTS, max_rows=4)
    refilled, by_batch = (
        simulate_run(scenario(costs=costs, continuous=continuous), seed=1) for continuous in (True, False)
    )
    assert refilled.ledger.phases["rollout"] < 0.9 * by_batch.ledger.phases["rollout"]


def test_one_step_off_takes_the_longer_of_the_two() -> None:
    """Locks out an overlap that is none: in the steady state a step is max(generate, train) + publish."""
    run = simulate_run(plain(**SPLIT), seed=0)
    ends = run.ledger.step_ends
    generate_s, train_s = generation_s() + 16.0, 64 * 170 * 4e-4
    assert ends[3] - ends[2] == pytest.approx(max(generate_s, train_s) + 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_one_step_off_is_never_slower(seed: int) -> None:
    both = [
        simulate_run(scenario(**{**SPLIT, "schedule": schedule}), seed) for schedule in ("one_step_off", "synchronous")
    ]
    assert both[0].seconds <= both[1].seconds


def test_scoring_is_a_queue() -> None:
    """The D/D/c limit: with arrivals faster than c workers serve, the last score is there after n s / c."""
    slow = simulate_run(replace(plain(), scoring=Scoring(2, LognormalLatency(3.0))), seed=0)
    assert slow.ledger.phases["score"] / 12 == pytest.approx(64 * 3.0 / 2)


def test_same_seed_same_run() -> None:
    """Locks out a random stream that depends on the order of events or on what ran before."""
    one, other, third = (simulate_run(scenario(failures=OFTEN), seed) for seed in (5, 5, 6))
    assert (one.seconds, one.ledger.phases, one.ledger.step_ends) == (
        other.seconds,
        other.ledger.phases,
        other.ledger.step_ends,
    )
    assert one.seconds != third.seconds


def test_steps_that_stand_in_give_the_same_time_on_average() -> None:
    """Locks out drawn steps that leave out a part of those they stand for."""
    full = simulate_run(scenario(steps=60), seed=0)
    drawn = simulate_run(scenario(steps=60), seed=0, detailed_steps=20)
    assert drawn.seconds == pytest.approx(full.seconds, rel=0.03)
    assert drawn.utilisation()["generate"] == pytest.approx(full.utilisation()["generate"], rel=0.1)
    assert drawn.utilisation()["score"] == pytest.approx(full.utilisation()["score"], rel=0.1)


def test_failures_cost_time() -> None:
    means = [
        statistics.mean(
            simulate_run(scenario(failures=replace(OFTEN, per_node_day=rate)), seed, detailed_steps=3).seconds
            for seed in range(12)
        )
        for rate in (0.0, 50.0, 200.0)
    ]
    assert means == sorted(means) and means[2] > 1.2 * means[0]


def test_lost_work_is_what_the_formula_expects() -> None:
    """Locks out failures that cost too little, that are too few, or that spare the start.

    M(1 - e^(-x/M)) are the expected seconds of a try of length x; after a failure come R seconds off the nodes, and
    (M + R)(e^(y/M) - 1) for all tries of length y = start + x.
    """
    failures = Failures(per_node_day=100.0, detect_s=10.0, requeue_s=10.0)
    some = plain(failures=failures, steps=60, checkpoint_every=2)
    quiet = simulate_run(replace(some, failures=Failures()), 0, detailed_steps=1)
    start, away, mtbf, segments = 20.0, 20.0, some.mtbf_s, 30
    segment = (quiet.seconds - start) / segments
    again = (mtbf + away) * math.expm1((start + segment) / mtbf)
    fails = -math.expm1(-segment / mtbf)
    expected = again + (segments - 1) * fails * (mtbf + away + again)
    found = [simulate_run(some, seed, detailed_steps=1).seconds for seed in range(60)]
    assert expected > 1.2 * quiet.seconds
    assert abs(statistics.mean(found) - expected) < 4 * statistics.stdev(found) / math.sqrt(len(found))


def test_a_step_that_outlasts_its_notice_is_lost() -> None:
    """Locks out jobs that run on behind their time limit: SLURM kills what does not end in time."""
    patient = simulate_run(scenario(time_limit_s=60.0), seed=0)
    hurried = simulate_run(scenario(time_limit_s=60.0, drain_s=0.01), seed=0)
    assert hurried.ledger.phases["lost"] > patient.ledger.phases["lost"] == 0.0
    assert hurried.seconds > patient.seconds and not hurried.failures


def test_four_thousand_gpus_finish() -> None:
    """512 engines and 512 nodes, 16,384 sequences a step; locks out events whose number grows with tokens."""
    large = scenario(
        steps=100, prompts_per_step=1024, group_size=16, engines=512, train_nodes=512, scoring=Scoring(512)
    )
    run = simulate_run(replace(large, failures=Failures(per_node_day=0.01)), 0, detailed_steps=2)
    assert math.isfinite(run.seconds) and all(sequences.whole for sequences in run.ledger.steps.values())


def test_a_run_that_never_gets_on_ends() -> None:
    """Locks out a simulation that goes on for ever where nodes fail faster than a step takes."""
    hopeless = scenario(failures=Failures(per_node_day=50_000.0))
    assert simulate_run(hopeless, 0, detailed_steps=1).seconds == math.inf
