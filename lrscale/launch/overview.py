"""The state of runs as people read it: a line a run, or all that is known of one."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence

from lrscale.config.diagnosis import described as checks
from lrscale.launch.progress import Progress
from lrscale.launch.status import RunStatus

HEADER = ("run", "state", "where", "reward", "s/step", "to go", "checkpoint", "job", "why")
_MISSING = "-"
_WHY_CHARACTERS = 60
_FAR_S = 60 * 86400.0
"""A time limit beyond this is none: SLURM gives a year where there is no limit."""


def table(
    statuses: Sequence[RunStatus], now: float | None = None
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and a row a run; columns in which no run has anything to say are left out."""
    rows = [row(status, now) for status in statuses]
    shown = [index for index in range(len(HEADER)) if any(one[index] not in ("", _MISSING) for one in rows)]
    return tuple(HEADER[index] for index in shown), tuple(tuple(one[index] for index in shown) for one in rows)


def row(status: RunStatus, now: float | None = None) -> tuple[str, ...]:
    """A run in the columns of HEADER."""
    now = now or time.time()
    progress, saved = status.progress, status.checkpoint
    going = status.state in ("running", "draining")
    return (
        status.name,
        status.state,
        where(progress),
        f"{progress.reward:.3f}" if progress and progress.reward is not None else _MISSING,
        f"{progress.step_s:.1f}" if progress and progress.step_s is not None else _MISSING,
        _span(progress.eta_s) if going and progress and progress.eta_s is not None else _MISSING,
        f"{_span(now - saved.saved)} ago" if saved else _MISSING,
        str(status.job_id) if status.job_id is not None else _MISSING,
        _cut(_cause(status) or _why(status, now)),
    )


def where(progress: Progress | None) -> str:
    """Stage, arm and step, as in `rl latent 12/24`."""
    if progress is None:
        return _MISSING
    words = [progress.stage.replace("_", " "), *([progress.arm.replace("_", " ")] if progress.arm else [])]
    return " ".join([*words, f"{progress.step}/{progress.steps}" if progress.steps else str(progress.step)])


def described(status: RunStatus, now: float | None = None) -> str:
    """All that is known of a run, in lines, and what can be done about it."""
    now = now or time.time()
    why = _why(status, now)
    head = f"{status.name}: {status.state}" + (f": {why}" if why else "")
    lines = [*_doing(status, now), *_place(status, now), *_advice(status)]
    return "\n  ".join([head, *lines])


def _doing(status: RunStatus, now: float) -> Iterator[str]:
    progress, saved = status.progress, status.checkpoint
    if cause := _cause(status):
        code = f" (exit code {status.failure.code})" if status.failure is not None else ""
        yield f"first failure: {cause}{code}"
    if status.preflight and status.state in ("failed", "stopped", "waiting for requeue"):
        yield "preflight:"
        yield from (f"  {line}" for line in checks(status.preflight).splitlines())
    if progress is not None:
        words = [f"{where(progress)} steps" if progress.steps else where(progress)]
        words += [f"reward {progress.reward:.3f}"] if progress.reward is not None else []
        words += [f"{progress.step_s:.1f} s a step"] if progress.step_s is not None else []
        if status.state in ("running", "draining"):
            words += [f"about {_span(progress.eta_s)} to go"] if progress.eta_s is not None else []
            words += [f"last step {_span(now - progress.updated)} ago"]
        yield ", ".join(words)
    if saved is not None:
        yield f"last checkpoint: {saved.stage.replace('_', ' ')} step {saved.step}, {_span(now - saved.saved)} ago"
    elif status.state not in ("not started", "queued"):
        yield "no checkpoint yet"


def _place(status: RunStatus, now: float) -> Iterator[str]:
    words = [f"job {status.job_id}"] if status.job_id is not None else []
    words += [f"on {status.nodes}"] if status.nodes and status.job_id is not None else []
    if status.since is not None:
        verb = {"queued": "submitted", "waiting for requeue": "submitted", "running": "started", "draining": "started"}
        words += [f"{verb.get(status.state, 'ended')} {_span(now - status.since)} ago"]
    if status.attempt is not None:
        words += [f"attempt {status.attempt}"]
    if status.ends is not None and now < status.ends < now + _FAR_S:
        words += [f"time limit in {_span(status.ends - now)}"]
    if words:
        yield ", ".join(words).replace(", on ", " on ", 1)
    if status.unfit and status.state != "finished":
        left_out = "; ".join(f"{node} ({reason.partition(';')[0]})" for node, reason in status.unfit.items())
        yield f"left out: {left_out}; a line taken out of bad_nodes.txt lets its node in again"
    if status.unanswered:
        yield f"{status.unanswered}: this is what the run directory tells"


def _advice(status: RunStatus) -> Iterator[str]:
    name = shlex.quote(str(status.path))
    if status.state in ("failed", "vanished"):
        yield f"lrscale logs {name} --errors    lrscale resume {name}"
    elif status.state in ("stopped", "cancelled"):
        yield f"lrscale resume {name}"
    elif status.state == "running":
        yield f"lrscale logs {name} -f    lrscale stop {name}"
    elif status.state == "finished":
        yield f"lrscale report {name}"


def _why(status: RunStatus, now: float) -> str:
    words = [" ".join(status.reason.split())] if status.reason else []
    if status.state in ("queued", "waiting for requeue") and status.expected and status.expected > now:
        words.append(f"SLURM expects to start it in {_span(status.expected - now)}")
    return "; ".join(words)


def _span(seconds: float) -> str:
    """`8 s`, `3 min`, `2 h 07 min`, `3 d 04 h`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def _cause(status: RunStatus) -> str:
    """Who failed first, and why, in a line; empty for what has not failed."""
    failure = status.failure
    if status.state != "failed" or failure is None:
        return status.error.removeprefix("error: ")
    on = f" on {failure.node}" if failure.node else ""
    reason = failure.reason.partition("\n")[0]
    return f"rank {failure.rank}{on}: {reason}"


def _cut(text: str) -> str:
    return text if len(text) <= _WHY_CHARACTERS else text[: _WHY_CHARACTERS - 3].rstrip() + "..."
