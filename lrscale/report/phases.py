"""Where a run's wall time went, added up from the seconds in its metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lrscale.report.runs import Metrics, Run, arm_title

PHASE_ORDER = ("rollout", "score", "update", "refresh", "evaluate")


@dataclass(frozen=True, slots=True)
class StageTime:
    """Wall seconds of one stage or arm, by phase; `other` is what no phase claims."""

    name: str
    seconds: dict[str, float]
    cpu_s: float | None
    """CPU seconds of the process, where the metrics tell."""

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


def stage_times(run: Run) -> list[StageTime]:
    """Traces, projector SFT and each arm, in order; stages without recorded seconds are left out.

    The refreshes of an arm are its phase `refresh`: their own lines are not counted again.
    """
    times = [
        _stage_time("traces", run.lines("traces")),
        _stage_time("projector SFT", run.lines("projector_sft", arm=None), default_phase="update"),
    ]
    for arm in run.arms:
        times.append(_stage_time(arm_title(arm), run.lines("rl", arm=arm), run.lines("evaluate", arm=arm)))
    return [time for time in times if time.total_s > 0]


def _stage_time(
    name: str, steps: Iterable[Metrics], evaluations: Iterable[Metrics] = (), default_phase: str = "other"
) -> StageTime:
    seconds: dict[str, float] = {}
    cpu: list[float] = []
    for line in steps:
        phases = {key.removesuffix("_s"): float(value) for key, value in line.items() if _is_phase(key) and value}
        for phase, value in phases.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
        rest = float(line.get("step_s") or 0.0) - sum(phases.values())
        if rest > 0:
            seconds[default_phase] = seconds.get(default_phase, 0.0) + rest
        if line.get("cpu_s") is not None:
            cpu.append(float(line["cpu_s"]))
    for line in evaluations:
        seconds["evaluate"] = seconds.get("evaluate", 0.0) + float(line.get("evaluate_s") or 0.0)
    return StageTime(name, {phase: seconds[phase] for phase in in_order(seconds)}, sum(cpu) if cpu else None)


def _is_phase(key: str) -> bool:
    return key.endswith("_s") and not key.endswith("cpu_s") and key != "step_s"


def in_order(phases: Iterable[str]) -> list[str]:
    """Known phases as a step runs them, then others by name, then `other`."""
    found = set(phases)
    known = [phase for phase in PHASE_ORDER if phase in found]
    extra = sorted(found - {*PHASE_ORDER, "other"})
    return known + extra + (["other"] if "other" in found else [])
