"""How many of the nodes should generate, and how many train."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lrscale.plan.lumps import Lump, lumps_of_steps
from lrscale.plan.simulation.rollouts import StepRecord
from lrscale.plan.simulation.run import simulate_run
from lrscale.plan.simulation.scenario import Failures, Scenario

_STEPS, _ENOUGH_SEQUENCES = 4, 12_000
"""Simulated for the time of a step."""
_COARSE = 9
_SCHEDULES = (operator.attrgetter("step_s"), operator.attrgetter("one_step_off_s"))


@dataclass(frozen=True, slots=True)
class SplitTime:
    """One way of giving out the nodes."""

    generate_nodes: int
    """0: engines and trainer share all of them by turns."""
    step_s: float
    """Generating and training one after the other; inf where it cannot run."""
    one_step_off_s: float
    """Generating while training; inf where nodes are shared."""
    reason: str = ""
    """Why it cannot run."""
    gpus_per_engine: int = 1


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
                tried[place] = split_time(build, candidates[place])
                told()

    last = len(candidates) - 1
    gap = max(1, math.ceil(last / (_COARSE - 1)))
    try_all({*range(0, last, gap), last})
    while gap > 1:
        gap //= 2
        centres = [min(tried, key=lambda place: seconds(tried[place])) for seconds in _SCHEDULES]
        try_all(centre + away for centre in centres for away in (-gap, gap))
    return tuple(tried[place] for place in sorted(tried))


def split_time(build: Callable[[int], Scenario], generate_nodes: int) -> SplitTime:
    """One of them, by both schedules."""
    try:
        scenario = build(generate_nodes)
    except ValueError as error:
        return SplitTime(generate_nodes, math.inf, math.inf, str(error))
    records = few_steps(scenario)
    step_s = steady_step_s(replace(scenario, schedule="synchronous"), records)
    if scenario.placement == "colocated":
        return SplitTime(generate_nodes, step_s, math.inf)
    return SplitTime(generate_nodes, step_s, steady_step_s(replace(scenario, schedule="one_step_off"), records))


def few_steps(scenario: Scenario) -> tuple[StepRecord, ...]:
    """How some of its steps go. Steps of many sequences differ little, so that one or two of these do."""
    steps = min(_STEPS, max(1, _ENOUGH_SEQUENCES // scenario.sequences))
    quiet = replace(scenario, steps=steps, arms=1, failures=Failures(), time_limit_s=None)
    return tuple(simulate_run(quiet, seed=0).workload.records.values())


def steady_step_s(scenario: Scenario, records: Sequence[StepRecord]) -> float:
    """Mean seconds of steps like these, without failures: over a whole period of refreshes and checkpoints, with a
    pipeline that is full."""
    costs = scenario.costs
    together = max if scenario.schedule == "one_step_off" else operator.add
    lumps = list(
        lumps_of_steps(
            Lump(costs.refresh_s, scenario.refresh_every), Lump(costs.checkpoint_s, scenario.checkpoint_every)
        )
    )
    return costs.publish_s + statistics.fmean(
        sum(
            share
            * together(record.scored_s, costs.logprobs_s(record.positions) + costs.updating_s(record.positions) + lump)
            for share, lump in lumps
        )
        for record in records
    )
