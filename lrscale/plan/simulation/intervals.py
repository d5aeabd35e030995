"""How often to save: a simulation of saving and failing alone, beside the formulas of Young and Daly.

Work is cut into segments, each saved at its end; segments are the events, so that years of a reliable machine take a
moment. How step times vary is left out: it hardly counts against how failures do.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from random import Random
from typing import cast

import simpy

_FAILURES = 300
"""Expected in each simulation: the mean of the work lost has a standard error of about 1 / sqrt(300) = 6 %."""
_MOST_SEGMENTS = 40_000


@dataclass(frozen=True, slots=True)
class Reliability:
    """What saving and failing cost."""

    checkpoint_s: float
    mtbf_s: float
    """Mean seconds between failures of the whole job; inf where none are expected."""
    restart_s: float
    """From a failure to the first new step: detection, queue, start."""

    def __post_init__(self) -> None:
        if self.checkpoint_s < 0 or self.restart_s < 0 or not self.mtbf_s > 0:
            raise ValueError(
                f"checkpoint {self.checkpoint_s:g} s, restart {self.restart_s:g} s, {self.mtbf_s:g} s between failures: "
                "needed 0 or more, 0 or more, above 0"
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
    """By simulation."""
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
    """Share of the wall time that is no work, with failures that are exponential, at restarts as well.

    Daly 2006: M e^(R/M) (e^((t + d)/M) - 1) seconds of wall time for t of work.
    """
    mtbf = reliability.mtbf_s
    if math.isinf(mtbf):
        return reliability.checkpoint_s / (work_s + reliability.checkpoint_s)
    exponent = (work_s + reliability.checkpoint_s) / mtbf
    if exponent + reliability.restart_s / mtbf > 600:
        return 1.0
    return 1 - work_s / (mtbf * math.exp(reliability.restart_s / mtbf) * math.expm1(exponent))


def simulated_overhead(work_s: float, reliability: Reliability, seed: int = 0) -> float:
    """The same by simulation."""
    if math.isinf(reliability.mtbf_s):
        return expected_overhead(work_s, reliability)
    env, random = simpy.Environment(), Random(f"{seed} interval {work_s:.6g}")
    segments = min(_MOST_SEGMENTS, max(20, math.ceil(_FAILURES * reliability.mtbf_s / work_s)))
    attempts = 100 * _FAILURES + segments
    worked = env.process(_saving_and_failing(env, random, (work_s, segments), reliability, attempts))
    env.run(until=worked)
    return 1 - cast(float, worked.value) / env.now


def _saving_and_failing(
    env: simpy.Environment, random: Random, work: tuple[float, int], reliability: Reliability, attempts: int
) -> Generator[simpy.Event, None, float]:
    """Seconds of work done; ends early, with what was done, where nearly every attempt is in vain."""
    work_s, segments = work
    failure_at = random.expovariate(1 / reliability.mtbf_s)
    done = 0
    for _ in range(attempts):
        if done == segments:
            break
        span = work_s + reliability.checkpoint_s
        if env.now + span <= failure_at:
            yield env.timeout(span)
            done += 1
            continue
        yield env.timeout(failure_at - env.now)
        while True:  # nodes fail while they start, too
            failure_at = env.now + random.expovariate(1 / reliability.mtbf_s)
            if env.now + reliability.restart_s <= failure_at:
                yield env.timeout(reliability.restart_s)
                break
            yield env.timeout(failure_at - env.now)
    return work_s * done


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
    return IntervalChoice(tuple(costs), min(costs, key=lambda cost: cost.simulated), chosen, young_s(reliability), daly)


def _candidates(step_s: float, chosen: int, daly: float, most: int) -> Sequence[int]:
    """Steps around Daly's interval, a factor of about 1.4 apart, and the recipe's own number."""
    if math.isinf(daly):
        return sorted({chosen, min(most, 10 * chosen)})
    centre = max(1.0, daly / step_s)
    around = {min(most, max(1, round(centre * 2 ** (power / 2)))) for power in range(-6, 7)}
    return sorted(around | {chosen})
