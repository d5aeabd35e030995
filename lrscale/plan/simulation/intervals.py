"""How often to save: a simulation of saving and failing alone, beside the formulas of Young and Daly.

Work is cut into segments, each saved at its end. Between two failures as many segments are done as fit, so that failures
are the events, and years of a reliable machine take as long as seconds of a hopeless one. How step times vary is left
out: it hardly counts against how failures do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

_FAILURES = 10_000
"""In each simulation, the same for all intervals."""
_NOISE = 1 / math.sqrt(_FAILURES)
"""Relative standard error of what so many failures take."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """What saving and failing cost."""

    checkpoint_s: float
    mtbf_s: float
    """Mean seconds between failures of the whole job; inf where none are expected."""
    start_s: float
    """From nodes that are there to the first new step; nodes fail meanwhile as they do at work."""
    away_s: float = 0.0
    """From a failure to new nodes: detection and queue. The job has none then, so none can fail."""

    def __post_init__(self) -> None:
        if min(self.checkpoint_s, self.start_s, self.away_s) < 0 or not self.mtbf_s > 0:
            raise ValueError(
                f"checkpoint {self.checkpoint_s:g} s, start {self.start_s:g} s, {self.away_s:g} s away, {self.mtbf_s:g} s "
                "between failures: needed 0 or more, and above 0 between failures"
            )


@dataclass(frozen=True, slots=True)
class IntervalCost:
    """An interval and what share of the wall time it costs beyond the work itself."""

    steps: int
    seconds: float
    """Of work between two checkpoints."""
    simulated: float
    """1 - work / wall time; 1 where the run never gets on."""
    expected: float
    """The same by `expected_overhead`."""


@dataclass(frozen=True, slots=True)
class IntervalChoice:
    """Intervals side by side."""

    costs: tuple[IntervalCost, ...]
    best: IntervalCost
    """Of those that the simulation cannot tell from the cheapest, the nearest to Daly's."""
    chosen: IntervalCost
    """The recipe's."""
    young_s: float
    daly_s: float


def young_s(reliability: Reliability) -> float:
    """Work between checkpoints after J. W. Young, CACM 17 (1974), 530: sqrt(2 d M), d a checkpoint, M the MTBF."""
    return math.sqrt(2 * reliability.checkpoint_s * reliability.mtbf_s)


def daly_s(reliability: Reliability) -> float:
    """The higher-order estimate of J. T. Daly, Future Generation Computer Systems 22 (2006), 303.

    sqrt(2 d M) [1 + sqrt(d / 2M) / 3 + (d / 2M) / 9] - d for d < 2M, else M.
    """
    checkpoint, mtbf = reliability.checkpoint_s, reliability.mtbf_s
    if math.isinf(mtbf):
        return math.inf
    if checkpoint >= 2 * mtbf:
        return mtbf
    ratio = checkpoint / (2 * mtbf)
    return math.sqrt(2 * checkpoint * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


def expected_overhead(work_s: float, reliability: Reliability) -> float:
    """Share of the wall time that is no work, with failures that are exponential, while a job starts as well.

    Daly 2006: t of work, d of saving and starts of R take M e^(R/M) (e^((t + d)/M) - 1) seconds on nodes that fail every
    M. These seconds hold 1/M as many failures on average, each of which keeps the job away for another W:
    (M + W) e^(R/M) (e^((t + d)/M) - 1) of wall time.
    """
    mtbf, saved_s = reliability.mtbf_s, work_s + reliability.checkpoint_s
    if math.isinf(mtbf):
        return reliability.checkpoint_s / saved_s
    if (saved_s + reliability.start_s) / mtbf > 600:
        return 1.0
    retried = math.exp(reliability.start_s / mtbf) * math.expm1(saved_s / mtbf)
    return 1 - work_s / ((mtbf + reliability.away_s) * retried)


def simulated_overhead(work_s: float, reliability: Reliability, seed: int = 0) -> float:
    """The same by simulation: failure after failure, and the segments that were done before each."""
    if math.isinf(reliability.mtbf_s):
        return expected_overhead(work_s, reliability)
    random = Random(f"{seed} failures")
    segment_s, segments, wall_s = work_s + reliability.checkpoint_s, 0, 0.0
    for _ in range(_FAILURES):
        up_s = random.expovariate(1 / reliability.mtbf_s)
        segments += int(max(0.0, up_s - reliability.start_s) // segment_s)
        wall_s += up_s + reliability.away_s
    return 1 - work_s * segments / wall_s


def best_interval(
    step_s: float, chosen_steps: int, reliability: Reliability, most_steps: int = 1 << 30
) -> IntervalChoice:
    """Numbers of steps between checkpoints side by side, around the formulas' and with the recipe's.

    `most_steps` are those of the run: it is saved at its end whatever is chosen.
    """
    if not step_s > 0 or chosen_steps < 1:
        raise ValueError(f"a step of {step_s:g} s saved every {chosen_steps}: needed above 0 and at least 1")
    daly = daly_s(reliability)
    costs = []
    for steps in _candidates(step_s, min(chosen_steps, most_steps), daly, most_steps):
        work_s = steps * step_s
        costs.append(
            IntervalCost(steps, work_s, simulated_overhead(work_s, reliability), expected_overhead(work_s, reliability))
        )
    chosen = next(cost for cost in costs if cost.steps == min(chosen_steps, most_steps))
    least = min(cost.simulated for cost in costs)
    cheap = [cost for cost in costs if cost.simulated <= least * (1 + _NOISE)]
    best = min(cheap, key=lambda cost: abs(cost.seconds - daly))
    return IntervalChoice(tuple(costs), best, chosen, young_s(reliability), daly)


def _candidates(step_s: float, chosen: int, daly: float, most: int) -> Sequence[int]:
    """Steps around Daly's interval, a factor of about 1.4 apart, and the recipe's own number."""
    if math.isinf(daly):
        return sorted({chosen, min(most, 10 * chosen)})
    centre = max(1.0, daly / step_s)
    around = {min(most, max(1, round(centre * 2 ** (power / 2)))) for power in range(-6, 7)}
    return sorted(around | {chosen})
