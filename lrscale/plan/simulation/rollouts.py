"""Generating and scoring the sequences of a step: in full, or as a step before it went."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from random import Random

import simpy

from lrscale.plan.simulation.engine import Engine, Request
from lrscale.plan.simulation.ledger import Ledger
from lrscale.plan.simulation.scenario import Scenario
from lrscale.plan.simulation.scoring import ScoringPool


@dataclass(frozen=True, slots=True)
class StepRecord:
    """How a step's generation went."""

    generated_s: float
    """Until the last engine had ended."""
    scored_s: float
    """Until the last score was there."""
    first_idle_s: float
    """Until the first engine had nothing left to do."""
    first_finished_s: float
    """Until the first sequence was finished, and scoring began."""
    generate_busy_s: float
    score_busy_s: float
    positions: int
    """To train on, prompts included."""


@dataclass(slots=True)
class Workload:
    """The sequences of every step: functions of (seed, step), so that a step done again is the same step."""

    scenario: Scenario
    seed: int
    detailed_steps: int
    """Steps up to this one are simulated sequence by sequence, later ones drawn from these."""
    records: dict[int, StepRecord] = field(default_factory=dict)

    def requests(self, step: int) -> list[Request]:
        scenario, random = self.scenario, self._random("lengths", step)
        return [
            Request(
                index, index // scenario.group_size, scenario.prompt_tokens, scenario.lengths.draw(random).positions
            )
            for index in range(scenario.sequences)
        ]

    def latencies(self, step: int) -> list[float]:
        random, latency = self._random("scores", step), self.scenario.scoring.latency
        return [latency.draw(random) for _ in range(self.scenario.sequences)]

    def drawn_record(self, step: int) -> StepRecord:
        """A step that was simulated in full stands in for this one."""
        steps = sorted(self.records)
        return self.records[steps[self._random("record", step).randrange(len(steps))]]

    def _random(self, purpose: str, step: int) -> Random:
        return Random(f"{self.seed} {purpose} {step}")


def generate(
    env: simpy.Environment, workload: Workload, step: int, ledger: Ledger
) -> Generator[simpy.Event, None, StepRecord]:
    """The step's sequences, generated and scored; returns how it went."""
    if step <= workload.detailed_steps:
        record = yield from _in_full(env, workload, step, ledger)
        workload.records[step] = record
        return record
    record = workload.drawn_record(step)
    sequences = ledger.open_step(step, workload.scenario.sequences)
    yield env.timeout(record.scored_s)
    once = b"\x01" * workload.scenario.sequences
    sequences.generated[:], sequences.scored[:] = once, once
    ledger.busy["generate"] += record.generate_busy_s
    ledger.busy["score"] += record.score_busy_s
    return record


def _in_full(
    env: simpy.Environment, workload: Workload, step: int, ledger: Ledger
) -> Generator[simpy.Event, None, StepRecord]:
    scenario, requests = workload.scenario, workload.requests(step)
    sequences = ledger.open_step(step, scenario.sequences)
    start, busy_before = env.now, ledger.busy["generate"]
    first_finished: list[float] = []

    def scored(index: int) -> None:
        sequences.scored[index] += 1

    pool = ScoringPool(env, scenario.scoring.workers, workload.latencies(step), scored)

    def finished(request: Request) -> None:
        if not first_finished:
            first_finished.append(env.now - start)
        sequences.generated[request.index] += 1
        pool.submit(request.index)

    engine = Engine(env, scenario.costs, scenario.continuous, partial(_add, ledger.busy, "generate"))
    ends: list[float] = []
    running = [
        env.process(_until_done(env, engine.run(share, finished), ends)) for share in shares(requests, scenario.engines)
    ]
    yield env.all_of(running)
    generated_s = env.now - start
    yield pool.all_scored
    ledger.busy["score"] += pool.busy_s
    return StepRecord(
        generated_s=generated_s,
        scored_s=env.now - start,
        first_idle_s=ends[0] - start if len(ends) == scenario.engines else 0.0,
        first_finished_s=first_finished[0],
        generate_busy_s=ledger.busy["generate"] - busy_before,
        score_busy_s=pool.busy_s,
        positions=sum(request.prompt_tokens + request.positions for request in requests),
    )


def shares(requests: list[Request], engines: int) -> Iterator[deque[Request]]:
    """A stretch of the sequences for each engine that gets any, as even as it goes.

    Samples of a prompt lie side by side, so that an engine prefills it once for most of them.
    """
    count = len(requests)
    for number in range(engines):
        share = requests[count * number // engines : count * (number + 1) // engines]
        if share:
            yield deque(share)


def _until_done(
    env: simpy.Environment, work: Generator[simpy.Event, None, None], ends: list[float]
) -> Generator[simpy.Event, None, None]:
    yield from work
    ends.append(env.now)


def _add(busy: dict[str, float], role: str, seconds: float) -> None:
    busy[role] += seconds
