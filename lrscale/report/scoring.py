"""The report's section on rewards: what scoring cost, how much of it hid behind generation, what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lrscale.report.runs import Metrics, Run, arm_title
from lrscale.report.sections import escape, missing, table_html
from lrscale.report.table import MISSING, Cells, count
from lrscale.report.timing import duration

KINDS = ("timeout", "error", "invalid", "unavailable")
_SLOWEST = 5


def rewards(runs: Sequence[Run]) -> str:
    """One row an arm; then the prompts that took longest."""
    rows, names, slow = [], [], []
    for run in runs:
        for arm in run.arms:
            lines = run.lines("reward", arm=arm)
            if not lines:
                continue
            names.append(arm)
            row = _row(lines)
            rows.append((arm_title(arm), *row) if len(runs) == 1 else (run.label, arm_title(arm), *row))
            slow += [(item["seconds"], item["prompt_id"], arm) for line in lines for item in line.get("slowest") or ()]
    if not rows:
        return missing("No step was scored outside the training process: the task's own rule costs next to nothing.")
    header = (
        "arm", "steps", "samples", "scoring", "waited for it", "hidden, %", "queue, max", "retries", "workers replaced",
        *(f"failed: {kind}" for kind in KINDS),
    )  # fmt: skip
    cells = Cells(header if len(runs) == 1 else ("run", *header), tuple(rows), 1 if len(runs) == 1 else 2)
    note = (
        "Scoring: seconds inside reward calls, all workers added up. Hidden: share of the wall time of scoring that was "
        "hidden behind generation. Failed samples are left out of advantages and loss; their tracebacks are in the "
        "attempts' logs."
    )
    return table_html(cells, arm_names=names) + f'<p class="note">{note}</p>' + _slowest(slow)


def _row(lines: Sequence[Metrics]) -> tuple[str, ...]:
    failed: Counter[str] = Counter()
    for line in lines:
        failed.update({kind: line.get(f"failed_{kind}") or 0 for kind in KINDS})
    return (
        str(len(lines)),
        count(_sum(lines, "samples")),
        duration(_sum(lines, "scoring_s")),
        duration(_sum(lines, "waited_s")),
        _hidden(lines),
        str(max(int(line.get("queue_max") or 0) for line in lines)),
        count(_sum(lines, "retries")),
        count(_sum(lines, "workers_replaced")),
        *(count(failed[kind]) for kind in KINDS),
    )


def _hidden(lines: Sequence[Metrics]) -> str:
    """Over all steps, each with the weight of its scoring."""
    busy_s, waited_s = _sum(lines, "busy_s"), _sum(lines, "waited_s")
    return f"{100 * max(0.0, 1.0 - waited_s / busy_s):.0f}" if busy_s > 0 else MISSING


def _sum(lines: Sequence[Metrics], key: str) -> float:
    return sum(line.get(key) or 0 for line in lines)


def _slowest(slow: Sequence[tuple[float, str, str]]) -> str:
    shown = sorted(slow, reverse=True)[:_SLOWEST]
    if not shown:
        return ""
    words = ", ".join(f"{prompt_id} ({arm_title(arm)}, {duration(seconds)})" for seconds, prompt_id, arm in shown)
    return f'<p class="note">Slowest to score: {escape(words)}.</p>'
