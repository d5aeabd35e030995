"""How many of the nodes should generate, and how many train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from lrscale.plan.simulation.run import simulate_run
from lrscale.plan.simulation.scenario import Failures, Scenario

_STEPS = 5
_COARSE = 9


@dataclass(frozen=True, slots=True)
class SplitTime:
    """One way of giving out the nodes."""

    generate_nodes: int
    train_nodes: int
    step_s: float
    """Mean of a few simulated steps; inf where it cannot run."""
    reason: str = ""
    """Why it cannot."""


def split_times(
    build: Callable[[int], Scenario], nodes: int, *, told: Callable[[], None] = lambda: None
) -> tuple[SplitTime, ...]:
    """Splits of the nodes, tried coarsely and then around the best, by the nodes that generate.

    Args:
        build: The scenario with so many nodes that generate. Its ValueError says that there is none.
        nodes: Of both roles together.
        told: Told after every split that was tried.

    Raises:
        ValueError: fewer than two nodes cannot be split.
    """
    if nodes < 2:
        raise ValueError(f"{nodes} node(s) cannot be split into generating and training ones; give at least 2")
    tried: dict[int, SplitTime] = {}

    def try_all(candidates: Iterable[int]) -> None:
        for count in candidates:
            if 0 < count < nodes and count not in tried:
                tried[count] = _timed(build, count, nodes)
                told()

    try_all(
        range(1, nodes) if nodes <= _COARSE + 1 else sorted({round(nodes * k / _COARSE) for k in range(1, _COARSE)})
    )
    gap = max(1, nodes // _COARSE)
    while gap > 1:
        gap //= 2
        centre = best(tried.values()).generate_nodes
        try_all((centre - gap, centre + gap))
    return tuple(tried[count] for count in sorted(tried))


def best(splits: Iterable[SplitTime]) -> SplitTime:
    """The one with the shortest step."""
    return min(splits, key=lambda split: split.step_s)


def _timed(build: Callable[[int], Scenario], generate_nodes: int, nodes: int) -> SplitTime:
    train_nodes = nodes - generate_nodes
    try:
        scenario = build(generate_nodes)
    except ValueError as error:
        return SplitTime(generate_nodes, train_nodes, math.inf, str(error))
    return SplitTime(generate_nodes, train_nodes, steady_step_s(scenario))


def steady_step_s(scenario: Scenario, steps: int = _STEPS) -> float:
    """Seconds a step without failures and checkpoints, once the pipeline is full; from few steps of one seed."""
    quiet = replace(
        scenario,
        steps=steps,
        failures=Failures(),
        time_limit_s=None,
        checkpoint_every=steps,
        refresh_every=0,
    )
    ends = simulate_run(quiet, seed=0).ledger.step_ends
    refresh_s = scenario.costs.refresh_s / scenario.refresh_every if scenario.refresh_every else 0.0
    return (ends[steps] - ends[1]) / (steps - 1) + refresh_s
