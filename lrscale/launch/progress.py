"""How far a run has come, from the end of its metrics.jsonl and from its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.launch.attempts import read_object

_TAIL_BYTES = 1 << 18
"""Enough for the last steps of any stage."""
_AVERAGED = 10
"""Steps over which the pace is taken."""
_STAGES = ("traces", "alignment", "projector_sft", "rl", "evaluate")


@dataclass(frozen=True, slots=True)
class SavedStep:
    """The newest whole checkpoint."""

    stage: str
    """A stage, or an arm of RL."""
    step: int
    saved: float
    """Unix time."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. None where it has not said so yet."""

    stage: str
    """traces, projector_sft, rl, evaluate."""
    arm: str | None
    step: int
    steps: int | None
    """Steps of this stage (of this arm); None where only the data tells."""
    reward: float | None
    """Mean reward of the last RL step."""
    step_s: float | None
    """Seconds a step, over the last few."""
    eta_s: float | None
    """Seconds until the last step of the stage; in RL, until that of the last arm, evaluations aside. None after it."""
    updated: float
    """Unix time of the last line of metrics.jsonl."""


def read_progress(run_dir: Path) -> Progress | None:
    """None before the first line of metrics."""
    path = run_dir / "metrics.jsonl"
    try:
        lines, updated = _tail(path), path.stat().st_mtime
    except OSError:
        return None
    lines = [line for line in lines if line.get("stage") in _STAGES and isinstance(line.get("step"), int)]
    if not lines:
        return None
    recipe = read_object(run_dir / "recipe.json") or {}
    last = lines[-1]
    stage, arm = str(last["stage"]), last.get("arm")
    steps = _steps(recipe, stage)
    pace = _pace(lines, last)
    remaining = _remaining(recipe, stage, arm, last["step"], steps)
    rewards = [line["reward_mean"] for line in lines if line.get("reward_mean") is not None]
    return Progress(
        stage=stage,
        arm=arm if isinstance(arm, str) else None,
        step=last["step"],
        steps=steps,
        reward=float(rewards[-1]) if rewards and stage in ("rl", "evaluate") else None,
        step_s=pace,
        eta_s=remaining * pace if pace is not None and remaining else None,
        updated=updated,
    )


def last_checkpoint(run_dir: Path) -> SavedStep | None:
    """The newest of all stages, by the time of its manifest; what has none is not whole."""
    found = []
    for manifest in (run_dir / "checkpoints").glob("*/step-*/manifest.json"):
        step = manifest.parent.name.removeprefix("step-")
        try:
            saved = manifest.stat().st_mtime
        except OSError:  # pruned at this moment
            continue
        if step.isdigit():
            found.append(SavedStep(manifest.parent.parent.name, int(step), saved))
    return max(found, key=lambda one: one.saved, default=None)


def _steps(recipe: Mapping[str, Any], stage: str) -> int | None:
    stages = recipe.get("stages") or {}
    own = stages.get("rl" if stage == "evaluate" else stage) or {}
    if stage == "traces" and own.get("prompts") and own.get("prompts_per_batch"):
        return -(-int(own["prompts"]) // int(own["prompts_per_batch"]))
    count = own.get("steps") if stage in ("rl", "evaluate") else own.get("max_steps")
    return int(count) if isinstance(count, int) and count and stage != "alignment" else None


def _remaining(recipe: Mapping[str, Any], stage: str, arm: Any, step: int, steps: int | None) -> int:
    """Steps to go, those of the arms that come after this one included."""
    if steps is None:
        return 0
    arms = ((recipe.get("stages") or {}).get("rl") or {}).get("arms") or []
    later = len(arms) - arms.index(arm) - 1 if stage in ("rl", "evaluate") and arm in arms else 0
    return max(steps - step, 0) + later * steps


def _pace(lines: Sequence[Mapping[str, Any]], last: Mapping[str, Any]) -> float | None:
    stage = "rl" if last["stage"] == "evaluate" else last["stage"]
    took = [line["step_s"] for line in lines if line["stage"] == stage and line.get("step_s") is not None]
    return sum(took[-_AVERAGED:]) / len(took[-_AVERAGED:]) if took else None


def _tail(path: Path) -> list[dict[str, Any]]:
    """Whole lines near the end of a file that may be growing."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _TAIL_BYTES, 0))
        text = file.read().decode("utf-8", errors="replace")
    found = []
    for line in text.split("\n"):  # a first one that is cut in two is no JSON
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
