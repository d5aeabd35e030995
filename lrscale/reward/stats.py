"""What scoring cost in a step, on one rank and over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SLOWEST = 3
"""Prompts named a step."""


@dataclass(slots=True)
class ScoringStats:
    """Counts since the last `take`; clocks, so they differ from run to run."""

    samples: int = 0
    work_s: float = 0.0
    """Seconds inside calls, added up over workers."""
    busy_s: float = 0.0
    """Wall seconds in which something was being scored or waited for it."""
    wait_s: float = 0.0
    """Wall seconds for which the trainer had nothing to do but wait for scores."""
    queue_max: int = 0
    """Most samples that waited for a worker at once."""
    retries: int = 0
    restarts: int = 0
    """Workers that were killed or died, and were replaced."""
    failed: Counter[str] = field(default_factory=Counter)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    """(seconds, prompt id), the slowest first."""

    def took(self, prompt_id: str, seconds: float) -> None:
        self.slowest = sorted([*self.slowest, (seconds, prompt_id)], reverse=True)[:SLOWEST]

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "work_s": self.work_s,
            "busy_s": self.busy_s,
            "wait_s": self.wait_s,
            "queue_max": self.queue_max,
            "retries": self.retries,
            "restarts": self.restarts,
            "failed": dict(self.failed),
            "slowest": self.slowest,
        }


def over_ranks(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a step from those of its ranks (`to_json`), with their names in metrics.jsonl.

    Ranks wait for each other, so the step waited as long as the rank that waited longest.
    """
    failed: Counter[str] = Counter()
    for part in parts:
        failed.update(part["failed"])
    busy_s, wait_s = (max(part[key] for part in parts) for key in ("busy_s", "wait_s"))
    slowest = sorted((tuple(item) for part in parts for item in part["slowest"]), reverse=True)[:SLOWEST]
    return {
        "samples": sum(part["samples"] for part in parts),
        "scoring_s": round(sum(part["work_s"] for part in parts), 6),
        "busy_s": round(busy_s, 6),
        "waited_s": round(wait_s, 6),
        "hidden_share": round(max(0.0, 1.0 - wait_s / busy_s), 6) if busy_s > 0 else None,
        "queue_max": max(part["queue_max"] for part in parts),
        "retries": sum(part["retries"] for part in parts),
        "workers_replaced": sum(part["restarts"] for part in parts),
        **{f"failed_{kind}": failed[kind] for kind in ("timeout", "error", "invalid", "unavailable")},
        "slowest": [{"prompt_id": prompt_id, "seconds": round(seconds, 3)} for seconds, prompt_id in slowest],
    }
