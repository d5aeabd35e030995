"""How many of the nodes should generate, and how many train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lrscale.plan.simulation.run import simulate_run
from lrscale.plan.simulation.scenario import Failures, Scenario

_STEPS, _ENOUGH_SEQUENCES = 3, 12_000
"""Simulated for the time of a step; steps of many sequences differ little, so that one or two do."""
_COARSE = 9


@dataclass(frozen=True, slots=True)
class SplitTime:
    """One way of giving out the nodes."""

    generate_nodes: int
    step_s: float
    """Mean of a few simulated steps; inf where it cannot run."""
    reason: str = ""
    """Why it cannot."""


def split_times(
    build: Callable[[int], Scenario], candidates: Sequence[int], *, told: Callable[[], None] = lambda: None
) -> tuple[SplitTime, ...]:
    """Splits side by side, by the nodes that generate; of many only some, and then those around the best.

    Args:
        build: The scenario with so many nodes that generate. Its ValueError says that there is none.
        candidates: Numbers of nodes that could generate, in order.
        told: Told after every split that was tried.

    Raises:
        ValueError: there is no candidate.
    """
    if not candidates:
        raise ValueError("no way to split the nodes: give at least 2, and a number over which the sequences divide")
    tried: dict[int, SplitTime] = {}

    def try_all(places: Iterable[int]) -> None:
        for place in places:
            if 0 <= place < len(candidates) and place not in tried:
                tried[place] = _timed(build, candidates[place])
                told()

    last = len(candidates) - 1
    gap = max(1, math.ceil(last / (_COARSE - 1)))
    try_all({*range(0, last, gap), last})
    while gap > 1:
        gap //= 2
        centre = min(tried, key=lambda place: tried[place].step_s)
        try_all((centre - gap, centre + gap))
    return tuple(tried[place] for place in sorted(tried))


def best(splits: Iterable[SplitTime]) -> SplitTime:
    """The one with the shortest step."""
    return min(splits, key=lambda split: split.step_s)


def _timed(build: Callable[[int], Scenario], generate_nodes: int) -> SplitTime:
    try:
        return SplitTime(generate_nodes, steady_step_s(build(generate_nodes)))
    except ValueError as error:
        return SplitTime(generate_nodes, math.inf, str(error))


def steady_step_s(scenario: Scenario) -> float:
    """Seconds a step without failures and checkpoints, once the pipeline is full; from few steps of one seed."""
    steps = min(_STEPS, max(1, _ENOUGH_SEQUENCES // scenario.sequences))
    quiet = replace(
        scenario,
        steps=steps + 1,
        failures=Failures(),
        time_limit_s=None,
        checkpoint_every=steps + 1,
        refresh_every=0,
    )
    ends = simulate_run(quiet, seed=0).ledger.step_ends
    refresh_s = scenario.costs.refresh_s / scenario.refresh_every if scenario.refresh_every else 0.0
    return (ends[steps + 1] - ends[1]) / steps + refresh_s
