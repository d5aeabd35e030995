"""What charts read of a plan.json: forgiving about what an older or a shorter plan leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_KINDS = {
    "states": "states",
    "live": "gathered weights",
    "activations": "activations",
    "engine activations": "activations",
    "logits": "logits",
    "latents": "latents",
    "optimizer step": "optimizer step",
    "engine weights": "engine weights",
    "cache": "cache",
    "allowance": "allowance",
}
"""Parts of the memory plan by what they are to a reader; all others are buffers."""
_ORDER = ("states", "buffers", *dict.fromkeys(kind for kind in _KINDS.values() if kind != "states"))
_SHOWN_STEPS = 3
_PHASES = {"logprobs": "log-probs"}


@dataclass(frozen=True, slots=True)
class MemoryBar:
    """The height of one phase."""

    phase: str
    parts: dict[str, float]
    """GiB a GPU."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class TimeBar:
    """A role that is busy."""

    role: str
    phase: str
    step: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class ScaleValue:
    """A number of GPUs."""

    gpus: int
    step_s: float
    fits: bool


@dataclass(frozen=True, slots=True)
class PlanValues:
    """A plan, as far as it is drawn; empty where it says nothing."""

    memory: tuple[MemoryBar, ...]
    limit_gib: float | None
    timeline: tuple[TimeBar, ...]
    simulated: bool
    """Whether the time line comes from a simulation, or from mean seconds."""
    scaling: tuple[ScaleValue, ...]
    gpus: int | None


def plan_values(plan: Mapping[str, Any]) -> PlanValues:
    """Of a plan.json; nothing of one that is damaged, which is no reason for a report not to be written."""
    try:
        return _read(plan)
    except (KeyError, TypeError, ValueError, AttributeError):
        return PlanValues((), None, (), False, (), None)


def _read(plan: Mapping[str, Any]) -> PlanValues:
    simulated = _timeline(_section(plan, "simulation").get("timeline"))
    limit, gpus = plan.get("gpu_limit_gib"), _section(plan, "layout").get("gpus")
    return PlanValues(
        memory=tuple(_memory(_section(_section(plan, "gpu_gib"), "phases"))),
        limit_gib=float(limit) if isinstance(limit, int | float) else None,
        timeline=simulated or tuple(_mean_step(plan)),
        simulated=bool(simulated),
        scaling=tuple(
            ScaleValue(int(point["gpus"]), float(point["step_s"]), bool(point["fits"]))
            for point in plan.get("scaling") or ()
        ),
        gpus=gpus if isinstance(gpus, int) else None,
    )


def _memory(phases: Mapping[str, Any]) -> Iterator[MemoryBar]:
    for phase, parts in phases.items():
        if not isinstance(parts, Mapping):
            continue
        sizes = dict.fromkeys(_ORDER, 0.0)
        for name, size in parts.items():
            if name != "total":
                sizes[_KINDS.get(name, "buffers")] += float(size)
        yield MemoryBar(phase, {kind: size for kind, size in sizes.items() if size > 0})


def _timeline(spans: Any) -> tuple[TimeBar, ...]:
    """The first steps of a simulated run, its start left out."""
    bars = [
        TimeBar(
            str(span["role"]),
            _PHASES.get(span["phase"], str(span["phase"])),
            int(span["step"]),
            float(span["start_s"]),
            float(span["end_s"]),
        )
        for span in spans or ()
        if span["phase"] != "start"
    ]
    last = max((bar.end_s for bar in bars if bar.role == "train" and bar.step <= _SHOWN_STEPS), default=0.0)
    return tuple(
        TimeBar(bar.role, bar.phase, bar.step, bar.start_s, min(bar.end_s, last)) for bar in bars if bar.start_s < last
    )


def _mean_step(plan: Mapping[str, Any]) -> Iterator[TimeBar]:
    """One step after the other at the plan's mean seconds, where nothing was simulated."""
    step, layout = _section(plan, "step_s"), _section(plan, "layout")
    if not step:
        return
    seconds = {name: float(step.get(name) or 0.0) for name in ("rollout", "scoring", "publish")}
    training = {name: float(step.get(name) or 0.0) for name in ("log_probs", "update", "refresh", "checkpoint")}
    generating, off = seconds["rollout"] + seconds["scoring"], bool(layout.get("one_step_off"))
    now = 0.0
    for number in range(1, (_SHOWN_STEPS if off else 1) + 1):
        if number == 1 or not off:
            yield from _row("generate", {"rollout": seconds["rollout"]}, number, now)
            yield from _row("score", {"score": seconds["scoring"]}, number, now + seconds["rollout"])
            now += generating
        if off:
            yield from _row("train", {"publish": seconds["publish"]}, number, now)
            now += seconds["publish"]
            yield from _row("generate", {"rollout": seconds["rollout"]}, number + 1, now)
            yield from _row("score", {"score": seconds["scoring"]}, number + 1, now + seconds["rollout"])
            yield from _row("train", training, number, now)
            now += max(generating, sum(training.values()))
        else:
            yield from _row("train", training | {"publish": seconds["publish"]}, number, now)


def _row(role: str, phases: Mapping[str, float], step: int, start_s: float) -> Iterator[TimeBar]:
    for name, seconds in phases.items():
        if seconds > 0:
            yield TimeBar(role, name.replace("_", "-"), step, start_s, start_s + seconds)
        start_s += seconds


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}
