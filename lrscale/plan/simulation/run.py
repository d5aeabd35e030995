"""A whole run: attempt after attempt, until the last step is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from lrscale.plan.simulation.attempt import Attempt, Span
from lrscale.plan.simulation.ledger import Ledger
from lrscale.plan.simulation.rollouts import Workload
from lrscale.plan.simulation.scenario import Scenario

_WITHOUT_PROGRESS = 200
"""So many attempts in a row without a new checkpoint, and the run is given up: it would go on for ever."""
_SPANS_OF_STEPS = 3, 64
"""At least and at most; between them as many as hold a refresh and a checkpoint."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a simulated run went."""

    seed: int
    seconds: float
    """From the first start to the last step; inf where it never ends."""
    failures: int
    drains: int
    """Passes through the queue that a time limit ended."""
    ledger: Ledger
    workload: Workload
    spans: tuple[Span, ...]
    """Of the first steps."""

    @property
    def restarts(self) -> int:
        return self.failures + self.drains

    @property
    def held_s(self) -> float:
        """Seconds for which the job has its nodes: those in the queue left out."""
        return self.seconds - self.ledger.phases["queue"]

    @property
    def step_s(self) -> float:
        """Mean seconds a step, checkpoints with it: start, queue, and what failures took left out."""
        productive = ("rollout", "score", "logprobs", "update", "refresh", "publish", "checkpoint")
        done = len(self.ledger.step_ends)
        return sum(self.ledger.phases[name] for name in productive) / done if done else math.inf

    def utilisation(self) -> dict[str, float]:
        """Share of the wall time that each role works, over all its engines, workers, or the trainer."""
        scenario = self.workload.scenario
        there = {"generate": scenario.engines, "score": scenario.scoring.workers, "train": 1}
        if not math.isfinite(self.seconds) or not self.seconds:
            return dict.fromkeys(there, 0.0)
        return {role: self.ledger.busy[role] / (count * self.seconds) for role, count in there.items()}


def simulate_run(
    scenario: Scenario,
    seed: int,
    *,
    detailed_steps: int | None = None,
    told: Callable[[int], None] = lambda step: None,
) -> RunOutcome:
    """One run of the scenario; equal arguments give equal outcomes.

    Args:
        detailed_steps: How many steps are simulated sequence by sequence; None: all. The later ones go as one of these
            did, drawn at random.
        told: Told of every step that is done.
    """
    workload = Workload(scenario, seed, scenario.all_steps if detailed_steps is None else max(1, detailed_steps))
    ledger, random = Ledger(), Random(f"{seed} failures")
    now, saved, failures, drains, vain = 0.0, 0, 0, 0, 0
    spans: list[Span] = []
    while True:
        attempt = Attempt(workload, ledger, now, saved, told, spans if not spans else None)
        # Exponential times have no memory: a fresh draw an attempt is the same as one clock through all of them.
        failure_s = now + random.expovariate(1.0 / scenario.mtbf_s) if math.isfinite(scenario.mtbf_s) else math.inf
        killed_s = math.inf if scenario.time_limit_s is None else now + scenario.time_limit_s + scenario.drain_s
        ending = attempt.until(min(failure_s, killed_s))
        now = attempt.env.now
        if ending == "finished":
            break
        vain = 0 if attempt.saved_step > saved else vain + 1
        saved = attempt.saved_step
        if ending == "failed":
            ledger.fall_back(saved, now - attempt.safe_s)
        if ending == "failed" and failure_s < killed_s:
            failures += 1
            ledger.spend("detect", scenario.failures.detect_s)
            now += scenario.failures.detect_s
        else:
            drains += 1
        ledger.spend("queue", scenario.failures.requeue_s)
        now += scenario.failures.requeue_s
        ledger.save()
        if vain >= _WITHOUT_PROGRESS:
            now = math.inf
            break
    shown = _first_steps(spans, scenario)
    return RunOutcome(seed, now, failures, drains, ledger, workload, shown)


def _first_steps(spans: Sequence[Span], scenario: Scenario) -> tuple[Span, ...]:
    """Until refresh and checkpoint have both been; what generates is a step ahead of the trainer."""
    least, most = _SPANS_OF_STEPS
    last = min(most, max(scenario.refresh_every, scenario.checkpoint_every) + least - 1)
    return tuple(span for span in spans if span.step <= last + (span.role != "train"))
