"""Checkpoint intervals against the published formulas."""

from __future__ import annotations

import math

import pytest

from lrscale.plan.simulation.intervals import (
    Reliability,
    best_interval,
    daly_s,
    expected_overhead,
    simulated_overhead,
    young_s,
)


@pytest.mark.parametrize(("mtbf_min", "published_min"), [(24 * 60, 117.0), (6 * 60, 57.0), (15, 9.1)])
def test_daly_gives_his_own_figures(mtbf_min: float, published_min: float) -> None:
    """Captions of figures 3 to 5 of Daly 2006: a dump of 5 minutes."""
    found = daly_s(Reliability(300.0, 60 * mtbf_min, 600.0)) / 60
    assert round(found, 1 if published_min < 10 else 0) == published_min


@pytest.mark.parametrize("away_s", [0.0, 20_000.0])
@pytest.mark.parametrize("work_s", [600.0, 3420.0, 10_000.0])
def test_simulated_overhead_is_the_expected_one(work_s: float, away_s: float) -> None:
    """Locks out failures that spare checkpoints or starts, or that strike in the queue; work lost twice or not at all."""
    reliability = Reliability(300.0, 6 * 3600.0, 600.0, away_s)
    assert simulated_overhead(work_s, reliability) == pytest.approx(expected_overhead(work_s, reliability), abs=0.015)


def test_the_best_interval_is_near_dalys() -> None:
    """And costs no more than the recipe's, which is far too short here."""
    choice = best_interval(60.0, 1, Reliability(120.0, 86400.0, 900.0))
    assert 0.5 < choice.best.seconds / choice.daly_s < 2.0
    assert choice.best.simulated < choice.chosen.simulated / 5
    assert (
        choice.young_s
        == pytest.approx(math.sqrt(2 * 120 * 86400), rel=1e-9)
        == young_s(Reliability(120.0, 86400.0, 900.0))
    )


def test_chance_does_not_move_the_best_interval_away_from_dalys() -> None:
    """Locks out 149 steps where the optimum is flat and Daly's are 106, as noise once had it (llama3-70b-split)."""
    choice = best_interval(233.0, 6, Reliability(134.0, 26.4 * 86400, 435.0, 360.0), most_steps=180)
    assert choice.best.seconds == pytest.approx(choice.daly_s, rel=0.02)


def test_without_failures_saving_less_is_better() -> None:
    choice = best_interval(60.0, 5, Reliability(30.0, math.inf, 900.0))
    assert choice.best.steps > 5 and choice.chosen.simulated == pytest.approx(30 / 330)


def test_hopeless_intervals_end() -> None:
    """Locks out a scan that never comes back where a segment is far longer than the machine holds."""
    assert simulated_overhead(86400.0, Reliability(10.0, 600.0, 60.0)) == 1.0


def test_the_queue_may_take_as_long_as_it_likes() -> None:
    """Locks out a wait in which failures that cannot happen start it anew, for ever where it takes many MTBFs."""
    patient = Reliability(60.0, 86400.0, 300.0, 1e9)
    done = [1 - overhead(3600.0, patient) for overhead in (simulated_overhead, expected_overhead)]
    assert done[0] == pytest.approx(done[1], rel=0.04) and 7e-5 < done[1] < 9e-5
    assert best_interval(60.0, 5, Reliability(60.0, 1e-5, 300.0, 1e9)).best.simulated == 1.0


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="needed 0 or more"):
        Reliability(-1.0, 100.0, 0.0)
    with pytest.raises(ValueError, match="above 0 and at least 1"):
        best_interval(0.0, 1, Reliability(1.0, 100.0, 0.0))
