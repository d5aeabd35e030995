"""One attempt of the job: from its start to the last step, a failure, or the time limit.

synchronous:   generate 1 | train 1, publish | generate 2 | train 2, publish | ...
one step off:  generate 1 | publish | generate 2 while 1 is trained on | publish | generate 3 while 2 ... | ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Literal, cast

import simpy

from lrscale.plan.simulation.ledger import Ledger
from lrscale.plan.simulation.rollouts import StepRecord, Workload, generate

Ending = Literal["finished", "drained", "failed"]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a role's time, for charts."""

    role: str
    phase: str
    step: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class Attempt:
    """A job that goes on behind the checkpoint of `saved_step`."""

    workload: Workload
    ledger: Ledger
    begun_s: float
    """When its nodes were there."""
    saved_step: int
    told: Callable[[int], None] = lambda step: None
    """Told of every step that is done."""
    spans: list[Span] | None = None
    """Filled where somebody wants to draw them."""
    safe_s: float = field(init=False)
    """When the last thing was done that no failure takes away."""
    env: simpy.Environment = field(init=False)

    def __post_init__(self) -> None:
        self.safe_s = self.begun_s
        self.env = simpy.Environment(initial_time=self.begun_s)

    def until(self, failure_s: float) -> Ending:
        """Run it; a node fails at `failure_s` unless it has ended before. Everything in flight is gone then."""
        job = self.env.process(self._job())
        if math.isinf(failure_s):
            self.env.run(until=job)
        else:
            self.env.run(until=job | self.env.timeout(failure_s - self.env.now))
        return cast(Ending, job.value) if job.triggered else "failed"

    def _job(self) -> Generator[simpy.Event, object, Ending]:
        scenario, env = self.workload.scenario, self.env
        drain_s = math.inf if scenario.time_limit_s is None else self.begun_s + scenario.time_limit_s
        resume_s = scenario.costs.resume_s if self.saved_step else 0.0
        yield from self._phase("start", scenario.costs.start_s + resume_s)
        ahead: simpy.Process | None = None
        for step in range(self.saved_step + 1, scenario.all_steps + 1):
            if ahead is None:
                ahead = self._generation(step)
            record = yield from self._rollouts(ahead)
            ahead = None
            if scenario.schedule == "one_step_off":
                yield from self._phase("publish", scenario.costs.publish_s, step)
                if not scenario.ends_arm(step):
                    ahead = self._generation(step + 1)
            yield from self._train(step, record)
            if scenario.schedule == "synchronous":
                yield from self._phase("publish", scenario.costs.publish_s, step)
            self.ledger.step_ends[step] = env.now
            self.told(step)
            drained = step < scenario.all_steps and env.now >= drain_s
            if scenario.saves(step) or drained:
                yield from self._phase("checkpoint", scenario.costs.checkpoint_s, step)
                self.saved_step, self.safe_s = step, env.now
                self.ledger.save()
            if drained:
                return "drained"
        return "finished"

    def _generation(self, step: int) -> simpy.Process:
        return self.env.process(self._drawn(step))

    def _drawn(self, step: int) -> Generator[simpy.Event, None, StepRecord]:
        start = self.env.now
        record = yield from generate(self.env, self.workload, step, self.ledger)
        if self.spans is not None:
            self._draw("generate", "rollout", step, start, start + record.first_idle_s)
            self._draw(
                "generate", "rollout, some engines idle", step, start + record.first_idle_s, start + record.generated_s
            )
            if record.score_busy_s:
                self._draw("score", "score", step, start + record.first_finished_s, start + record.scored_s)
        return record

    def _rollouts(self, generation: simpy.Process) -> Generator[simpy.Event, object, StepRecord]:
        """Wait for a step's sequences and scores."""
        began = self.env.now
        if not generation.triggered:
            yield generation
        record = cast(StepRecord, generation.value)
        waited = self.env.now - began
        for_scores = min(waited, record.scored_s - record.generated_s)
        self.ledger.spend("score", for_scores)
        self.ledger.spend("rollout", waited - for_scores)
        return record

    def _train(self, step: int, record: StepRecord) -> Generator[simpy.Event, object, None]:
        scenario, costs = self.workload.scenario, self.workload.scenario.costs
        for phase, seconds in (
            ("logprobs", costs.logprobs_s(record.positions)),
            ("update", costs.updating_s(record.positions)),
            ("refresh", costs.refresh_s if scenario.refreshes(step) else 0.0),
        ):
            yield from self._phase(phase, seconds, step)
            self.ledger.busy["train"] += seconds
        sequences = self.ledger.steps[step]
        sequences.trained = bytearray(times + 1 for times in sequences.trained)

    def _phase(self, phase: str, seconds: float, step: int = 0) -> Generator[simpy.Event, object, None]:
        """Seconds of the trainer's."""
        if seconds:
            start = self.env.now
            yield self.env.timeout(seconds)
            self._draw("train", phase, step, start, self.env.now)
        self.ledger.spend(phase, seconds)

    def _draw(self, role: str, phase: str, step: int, start_s: float, end_s: float) -> None:
        if self.spans is not None and end_s > start_s:
            self.spans.append(Span(role, phase, step, start_s, end_s))
