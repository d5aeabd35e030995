"""What charts read of a plan.json: forgiving about what an older or a shorter plan leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
_SELDOM = ("refresh", "checkpoint")


@dataclass(frozen=True, slots=True)
class MemoryBar:
    """The height of one phase."""

    phase: str
    parts: dict[str, float]
    """GiB a GPU."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def planned(self) -> float:
        """The allowance for what nobody planned left out."""
        return self.total - self.parts.get("allowance", 0.0)


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
    simulated: tuple[int, int] | None
    """First and last step of the time line where it comes from a simulation; None: from mean seconds."""
    every_steps: dict[str, int]
    """Steps from one to the next of what does not come in every step."""
    scaling: tuple[ScaleValue, ...]
    gpus: int | None

    @property
    def small(self) -> bool:
        """Whether the allowance would dwarf all else: MiB are shown then, and no allowance."""
        return all(bar.planned < 1 for bar in self.memory)


def plan_values(plan: Mapping[str, Any]) -> PlanValues:
    """Of a plan.json; nothing of one that is damaged, which is no reason for a report not to be written."""
    try:
        return _read(plan)
    except (KeyError, TypeError, ValueError, AttributeError):
        return PlanValues((), None, (), None, {}, (), None)


def _read(plan: Mapping[str, Any]) -> PlanValues:
    simulated, shown = _timeline(_section(plan, "simulation").get("timeline"))
    limit, gpus = plan.get("gpu_limit_gib"), _section(plan, "layout").get("gpus")
    return PlanValues(
        memory=tuple(_memory(_section(_section(plan, "gpu_gib"), "phases"))),
        limit_gib=float(limit) if isinstance(limit, int | float) else None,
        timeline=simulated or tuple(_mean_step(plan)),
        simulated=shown,
        every_steps={name: int(steps) for name, steps in _section(plan, "every_steps").items() if steps > 1},
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


def _timeline(spans: Any) -> tuple[tuple[TimeBar, ...], tuple[int, int] | None]:
    """Consecutive steps of a simulated run, and the first and the last of them; its start is left out."""
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
    training = [bar for bar in bars if bar.role == "train"]
    if not training:
        return (), None
    first = _fullest(training)
    last = min(first + _SHOWN_STEPS - 1, training[-1].step)
    start = min(bar.start_s for bar in bars if bar.step == first)
    end = max(bar.end_s for bar in training if bar.step == last)
    shown = (replace(bar, start_s=max(bar.start_s, start), end_s=min(bar.end_s, end)) for bar in bars)
    return tuple(bar for bar in shown if bar.start_s < bar.end_s), (first, last)


def _fullest(training: Sequence[TimeBar]) -> int:
    """The first of the consecutive steps that show most of what does not come in every step."""
    seldom = {(bar.phase, bar.step) for bar in training if bar.phase in _SELDOM}
    firsts = range(training[0].step, max(training[0].step, training[-1].step - _SHOWN_STEPS + 1) + 1)
    return max(firsts, key=lambda first: len({name for name, step in seldom if 0 <= step - first < _SHOWN_STEPS}))


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
