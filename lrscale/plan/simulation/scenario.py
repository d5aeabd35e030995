"""What is simulated: work, machines and their rates, failures. Every value is checked here, once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Literal, Protocol

from lrscale.plan.simulation.lengths import LengthSource


class Latency(Protocol):
    """Seconds that one score takes."""

    def draw(self, random: Random) -> float: ...


@dataclass(frozen=True, slots=True)
class LognormalLatency:
    """Log-normal seconds of a given mean; `spread` is the deviation of their logarithm, 0 makes them all the same."""

    mean_s: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not self.mean_s >= 0 or not self.spread >= 0:
            raise ValueError(f"scoring: given {self.mean_s:g} s, spread {self.spread:g}; needed at least 0 for both")

    def draw(self, random: Random) -> float:
        if not self.mean_s or not self.spread:
            return self.mean_s
        return random.lognormvariate(math.log(self.mean_s) - self.spread**2 / 2, self.spread)


@dataclass(frozen=True, slots=True)
class Scoring:
    """Workers that score beside generation, the first free one taking the sample that came first."""

    workers: int
    latency: Latency = field(default_factory=lambda: LognormalLatency(0.0))

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"scoring: given {self.workers} workers, needed at least 1")


@dataclass(frozen=True, slots=True)
class Costs:
    """What the parts of a step take on their machines."""

    prefill_tokens_per_s: float
    """Of one engine."""
    decode_s: Callable[[int, float], float]
    """(rows side by side, mean positions behind each) to seconds of one more position of all of them, on one engine."""
    max_rows: int
    """Rows of one engine; what its KV memory holds, or the recipe's limit."""
    shared_prefill: bool = True
    """Whether an engine computes the prompt of a group once."""
    logprob_s_per_token: float = 0.0
    """Wall seconds of the whole trainer a position (prompts included)."""
    update_s_per_token: float = 0.0
    publish_s: float = 0.0
    refresh_s: float = 0.0
    checkpoint_s: float = 0.0
    """The trainer waits for it."""
    start_s: float = 0.0
    """From the first process to the first step: imports, process groups, weights."""
    resume_s: float = 0.0
    """More of it where there is a checkpoint to go on from."""
    update_s: float = 0.0
    """Of an update whatever its tokens."""

    def __post_init__(self) -> None:
        negative = [
            name
            for name in self.__slots__
            if name not in ("decode_s", "max_rows", "shared_prefill") and not getattr(self, name) >= 0.0
        ]
        if negative:
            raise ValueError(f"costs: {', '.join(negative)} below 0; give seconds")
        if not self.prefill_tokens_per_s > 0:
            raise ValueError("costs: prefill_tokens_per_s has to be above 0")
        if self.max_rows < 1:
            raise ValueError(
                f"costs: an engine holds {self.max_rows} rows, so nothing can be generated: its KV memory is too small "
                "for one sequence; give it more GPUs or shorter sequences"
            )

    def logprobs_s(self, positions: int) -> float:
        """Of a step."""
        return positions * self.logprob_s_per_token

    def updating_s(self, positions: int) -> float:
        """Of a step."""
        return self.update_s + positions * self.update_s_per_token


@dataclass(frozen=True, slots=True)
class Failures:
    """Nodes that fail, and what follows."""

    per_node_day: float = 0.0
    """Exponential and independent: the job's rate is this times its nodes."""
    detect_s: float = 60.0
    """Until the job has ended; ranks that hang are noticed after parallel.stall_limit_s at the latest."""
    requeue_s: float = 300.0
    """In the queue, before nodes are there again."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.per_node_day) and self.per_node_day >= 0):
            raise ValueError(f"failures: given {self.per_node_day:g} a node and day, needed 0 or more")
        if not self.detect_s >= 0 or not self.requeue_s >= 0:
            raise ValueError(
                f"failures: given {self.detect_s:g} s to detect and {self.requeue_s:g} s to requeue, needed 0 or more"
            )


Placement = Literal["colocated", "split"]
"""Engines and trainer on the same GPUs by turns, or on nodes of their own."""
Schedule = Literal["synchronous", "one_step_off"]
"""Whether the next step's rollouts are generated while this one's are trained on."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A run of RL."""

    steps: int
    """Of each arm."""
    prompts_per_step: int
    group_size: int
    prompt_tokens: int
    lengths: LengthSource
    costs: Costs
    scoring: Scoring
    engines: int
    train_nodes: int
    generate_nodes: int = 0
    """Nodes of their own; 0 where engines and trainer share."""
    placement: Placement = "colocated"
    schedule: Schedule = "synchronous"
    continuous: bool = True
    """Whether a row that ends makes room for the next at once (vLLM), or rows are decoded batch by batch (local)."""
    checkpoint_every: int = 10
    refresh_every: int = 0
    """RL steps; 0 never."""
    failures: Failures = field(default_factory=Failures)
    drain_s: float = math.inf
    """From being asked to end to being killed (cluster.drain_s)."""
    time_limit_s: float | None = None
    """Of one pass through the queue, less the time to drain; the run saves and queues again."""
    arms: int = 1
    """Trained one after the other, all alike."""

    def __post_init__(self) -> None:
        counts = ("steps", "arms", "prompts_per_step", "group_size", "engines", "train_nodes", "checkpoint_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"simulation: {name} is {getattr(self, name)}, needed at least 1")
        if self.prompt_tokens < 0 or self.refresh_every < 0:
            raise ValueError("simulation: prompt_tokens and refresh_every are counts, 0 or more")
        if self.placement == "split" and self.generate_nodes < 1:
            raise ValueError("simulation: split placement needs at least 1 node that generates (given 0)")
        if self.placement == "colocated" and self.generate_nodes:
            raise ValueError("simulation: colocated engines have no nodes of their own; give placement split")
        if self.schedule == "one_step_off" and self.placement != "split":
            raise ValueError(
                "simulation: one step off policy generates while it trains, which needs nodes for each: placement split"
            )
        if self.time_limit_s is not None and self.time_limit_s <= self.costs.start_s:
            raise ValueError(
                f"simulation: the time limit leaves {self.time_limit_s:.0f} s, and starting takes "
                f"{self.costs.start_s:.0f} s: no step would ever be done"
            )

    @property
    def all_steps(self) -> int:
        """Of all arms."""
        return self.arms * self.steps

    def ends_arm(self, step: int) -> bool:
        return step % self.steps == 0

    def refreshes(self, step: int) -> bool:
        return self.refresh_every > 0 and self._of_arm(step) % self.refresh_every == 0

    def saves(self, step: int) -> bool:
        return self._of_arm(step) % self.checkpoint_every == 0 or self.ends_arm(step)

    def _of_arm(self, step: int) -> int:
        return (step - 1) % self.steps + 1

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.prompts_per_step * self.group_size

    @property
    def nodes(self) -> int:
        """All that can fail."""
        return self.train_nodes + self.generate_nodes

    @property
    def mtbf_s(self) -> float:
        """Mean seconds between failures of the job."""
        rate = self.failures.per_node_day * self.nodes / 86400
        return 1 / rate if rate > 0 else math.inf
