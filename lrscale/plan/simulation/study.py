"""What `lrscale plan --simulate` finds out: several runs of a recipe, and what would change them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lrscale.plan.layout import Layout
from lrscale.plan.simulation.attempt import Span
from lrscale.plan.simulation.intervals import IntervalChoice, Reliability, best_interval
from lrscale.plan.simulation.lengths import mean_completion
from lrscale.plan.simulation.planned import PlannedRun
from lrscale.plan.simulation.run import RunOutcome, simulate_run
from lrscale.plan.simulation.scenario import Scenario
from lrscale.plan.simulation.splits import SplitTime, few_steps, split_times, steady_step_s

_DETAILED_SEQUENCES = 60_000
"""Simulated one by one, over all seeds; with more of them further steps are drawn from those."""
_LEAST_DETAILED = 3


@dataclass(frozen=True, slots=True)
class Spread:
    """Of several seeds."""

    median: float
    low: float
    """10 %."""
    high: float
    """90 %."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        if len(ordered) == 1 or math.isinf(ordered[-1]):
            return cls(statistics.median(ordered), ordered[0], ordered[-1])
        tenths = statistics.quantiles(ordered, n=10, method="inclusive")
        return cls(statistics.median(ordered), tenths[0], tenths[-1])

    def times(self, factor: float) -> Spread:
        return Spread(*(value * factor for value in (self.median, self.low, self.high)))


@dataclass(frozen=True, slots=True)
class SplitChoice:
    """Ways of sharing the nodes out between generating and training, vLLM engines beside the trainer among them."""

    nodes: int
    tried: tuple[SplitTime, ...]

    @property
    def best(self) -> SplitTime:
        """With the shortest step where generating and training take turns, as lrscale runs it."""
        return min(self.tried, key=lambda split: split.step_s)

    @property
    def best_off(self) -> SplitTime:
        """One step off policy."""
        return min(self.tried, key=lambda split: split.one_step_off_s)

    def to_json(self) -> dict[str, Any]:
        """The best rows are null where none runs."""
        best, off = (_way(split) for split in (self.best, self.best_off))
        return {
            "nodes": self.nodes,
            "best": None if best["step_s"] is None else best,
            "best_one_step_off": None if off["one_step_off_s"] is None else off,
            "tried": [_way(split) for split in self.tried],
        }


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A way of reasoning."""

    name: str
    lengths: str
    """Where they come from."""
    tokens: float
    """A completion, mean."""
    latent_steps: float
    step_s: float


@dataclass(frozen=True, slots=True)
class Study:
    """The findings."""

    scenario: Scenario
    seeds: int
    detailed_steps: int
    """Of each seed; the later steps are drawn from them."""
    seconds: Spread
    """To the last step."""
    gpu_hours: Spread
    """For which the job holds its nodes: lost work counts, the queue does not."""
    price: float | None
    """Of a GPU-hour."""
    step_s: Spread
    ended: int
    """Runs that came to the last step; the others fail again and again before they can save."""
    failures: float
    """Mean of these."""
    restarts: int
    """Of that with most of them, time limits included."""
    phases: dict[str, float]
    """Share of the wall time of all runs."""
    utilisation: dict[str, float]
    intervals: IntervalChoice
    split: SplitChoice | None
    """None where the sequences divide over no part of the nodes."""
    reasoning: tuple[Reasoning, Reasoning]
    """As the recipe has it, and the other way."""
    spans: tuple[Span, ...]
    """The first steps of the first seed."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; what never ends is null."""
        intervals = self.intervals
        return {
            "steps": self.scenario.steps,
            "arms": self.scenario.arms,
            "seeds": self.seeds,
            "detailed_steps": self.detailed_steps,
            "placement": self.scenario.placement,
            "schedule": self.scenario.schedule,
            "lengths": self.scenario.lengths.name,
            "ended": self.ended,
            "seconds": _spread(self.seconds),
            "gpu_hours": _spread(self.gpu_hours),
            "price": None if self.price is None else _spread(self.gpu_hours.times(self.price)),
            "step_s": _spread(self.step_s),
            "failures_mean": self.failures,
            "restarts_max": self.restarts,
            "phase_shares": {name: round(share, 6) for name, share in self.phases.items()},
            "utilisation": {name: round(share, 6) for name, share in self.utilisation.items()},
            "checkpoints": {
                "chosen_steps": intervals.chosen.steps,
                "chosen_overhead": intervals.chosen.simulated,
                "best_steps": intervals.best.steps,
                "best_overhead": intervals.best.simulated,
                "young_s": _number(intervals.young_s),
                "daly_s": _number(intervals.daly_s),
                "mtbf_s": _number(self.scenario.mtbf_s),
            },
            "split": self.split and self.split.to_json(),
            "reasoning": [
                {"name": r.name, "tokens": r.tokens, "latent_steps": r.latent_steps, "step_s": r.step_s}
                for r in self.reasoning
            ],
            "timeline": [
                {
                    "role": s.role,
                    "phase": s.phase,
                    "step": s.step,
                    "start_s": round(s.start_s, 3),
                    "end_s": round(s.end_s, 3),
                }
                for s in self.spans
            ],
        }


def study(
    planned: PlannedRun,
    layout: Layout,
    *,
    seeds: int = 5,
    price: float | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Study:
    """Simulate a recipe as it is laid out, and look at what could be chosen differently.

    Args:
        seeds: Runs, with seeds from 0 on.
        price: Of a GPU-hour.
        told: Told how much is done, and of how much.

    Raises:
        ValueError: the layout is impossible, an engine holds no sequence, or numbers that cannot be.
    """
    if seeds < 1:
        raise ValueError(f"seeds: given {seeds}, needed at least 1")
    scenario = planned.scenario(layout)
    detailed = min(scenario.all_steps, max(_LEAST_DETAILED, _DETAILED_SEQUENCES // (seeds * scenario.sequences)))
    count = _Count(told, seeds * scenario.all_steps)
    runs = [
        simulate_run(scenario, seed, detailed_steps=detailed, told=count.farthest(seed * scenario.all_steps))
        for seed in range(seeds)
    ]
    ended = [run for run in runs if math.isfinite(run.seconds)]
    records = few_steps(scenario)
    unsaved_s = steady_step_s(replace(scenario, costs=replace(scenario.costs, checkpoint_s=0.0)), records)
    reliability = Reliability(
        scenario.costs.checkpoint_s,
        scenario.mtbf_s,
        scenario.costs.start_s + scenario.costs.resume_s,
        scenario.failures.detect_s + scenario.failures.requeue_s,
    )
    return Study(
        scenario=scenario,
        seeds=seeds,
        detailed_steps=detailed,
        seconds=Spread.of([run.seconds for run in runs]),
        gpu_hours=Spread.of([run.held_s / 3600 * layout.gpus for run in runs]),
        price=price,
        step_s=Spread.of([run.step_s for run in runs]),
        ended=len(ended),
        failures=statistics.fmean(run.failures for run in ended) if ended else 0.0,
        restarts=max((run.restarts for run in ended), default=0),
        phases=_shares(runs),
        utilisation={role: statistics.fmean(run.utilisation()[role] for run in runs) for role in runs[0].utilisation()},
        intervals=best_interval(unsaved_s, scenario.checkpoint_every, reliability, scenario.steps),
        split=_best_split(planned, layout),
        reasoning=_reasoning(planned, scenario, steady_step_s(scenario, records)),
        spans=runs[0].spans,
    )


class _Count:
    """Steps that are done, of all runs; those that a failure took are not counted twice."""

    def __init__(self, told: Callable[[int, int], None], total: int) -> None:
        self._told, self._total, self._done = told, total, 0

    def farthest(self, before: int) -> Callable[[int], None]:
        def step(number: int) -> None:
            if before + number > self._done:
                self._done = before + number
                self._told(self._done, self._total)

        return step


def _shares(runs: Sequence[RunOutcome]) -> dict[str, float]:
    total = sum(sum(run.ledger.phases.values()) for run in runs)
    return {name: sum(run.ledger.phases[name] for run in runs) / total for name in runs[0].ledger.phases}


def _best_split(planned: PlannedRun, layout: Layout) -> SplitChoice | None:
    candidates, kinds = planned.candidates(layout), list(planned.engines_of(layout))
    apart = [count for count in candidates if count]
    tried: list[SplitTime] = []
    if 0 in candidates:
        tried += [_timed(planned, kind, [0])[0] for kind in kinds]
    if apart:
        # What an engine spans is settled with half of the nodes; how many nodes there should be, with that.
        half = max((count for count in apart if count <= layout.nodes / 2), default=apart[0])
        kind = min(kinds, key=lambda kind: _timed(planned, kind, [half])[0].step_s) if len(kinds) > 1 else kinds[0]
        tried += _timed(planned, kind, apart)
    return SplitChoice(layout.nodes, tuple(tried)) if tried else None


def _timed(planned: PlannedRun, kind: Layout, candidates: Sequence[int]) -> list[SplitTime]:
    times = split_times(lambda count: planned.split(kind, count), candidates)
    return [replace(time, gpus_per_engine=kind.tensor_parallel) for time in times]


def _reasoning(planned: PlannedRun, scenario: Scenario, steady_s: float) -> tuple[Reasoning, Reasoning]:
    names = ("with latents", "discrete") if planned.work.latent_share else ("discrete", "with latents")
    other = planned.in_the_other_way(scenario)
    ways = []
    for name, way, step_s in zip(
        names, (scenario, other), (steady_s, steady_step_s(other, few_steps(other))), strict=True
    ):
        tokens, latents = mean_completion(way.lengths)
        ways.append(Reasoning(name, way.lengths.name, tokens, latents, step_s))
    return ways[0], ways[1]


def _way(split: SplitTime) -> dict[str, Any]:
    return {
        "rollout_nodes": split.generate_nodes,
        "gpus_per_engine": split.gpus_per_engine,
        "step_s": _number(split.step_s),
        "one_step_off_s": _number(split.one_step_off_s),
        "reason": split.reason,
    }


def _spread(spread: Spread) -> dict[str, float | None]:
    return {"median": _number(spread.median), "p10": _number(spread.low), "p90": _number(spread.high)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
