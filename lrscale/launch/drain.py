"""How a run is asked to end: with a checkpoint (drain), or at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from lrscale.launch import slurm
from lrscale.launch.attempts import DRAIN, attempt_folders, lock_holder
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.status import ACTIVE, Cluster, RunStatus, status_of

_ASK_S = 1.0
STOP = "stop"
"""What a drain file says that a person has asked for: the batch script does not requeue after it."""


def stop(status: RunStatus, *, now: bool) -> str:
    """Ask a run to end; what was done, in words. `now`: without a checkpoint.

    Raises:
        LaunchError: the run is not going on (7), or SLURM does not answer (75).
    """
    if status.unanswered and (now or status.state not in ("running", "draining")):
        raise LaunchError(
            f"SLURM has to be told, but does not answer: {status.unanswered}",
            code=ExitCode.TRY_LATER,
            help="try again later" + ("; without --now a running job is drained through its folder" if now else ""),
        )
    if status.state not in ACTIVE:
        raise LaunchError(
            f"{status.path} is not going on: {status.state}" + (f" ({status.reason})" if status.reason else ""),
            code=ExitCode.NOT_FOUND,
            help="nothing has to be stopped",
        )
    if status.job_id is None:
        return _kill(status) if now else _drain(status)
    if now or status.state in ("queued", "waiting for requeue"):
        _leave_queue(status)
        slurm.cancel(status.job_id)
        return f"job {status.job_id} is cancelled" + ("" if now else ": it was waiting")
    return _drain(status)


def wait_for_end(run_dir: Path, limit_s: float | None = None) -> RunStatus:
    """The state of a run once it no longer goes on, or when the time is over; asks every few seconds."""
    deadline = None if limit_s is None else time.monotonic() + limit_s
    cluster = Cluster()
    while True:
        status = status_of(run_dir, cluster)
        if status.state not in ACTIVE or (deadline is not None and time.monotonic() >= deadline):
            return status
        time.sleep(_ASK_S)


def _leave_queue(status: RunStatus) -> None:
    """A script that is just ending its attempt would requeue a job that was cancelled a moment before."""
    folders = attempt_folders(status.path)
    if folders:
        with contextlib.suppress(OSError):
            (folders[-1] / DRAIN).write_text(f"{STOP}\n", encoding="utf-8")


def _drain(status: RunStatus) -> str:
    folders = attempt_folders(status.path)
    if not folders:
        raise LaunchError(
            f"{status.path} has not started its first attempt yet",
            code=ExitCode.TRY_LATER,
            help="try again in a minute, or cancel it: --now",
        )
    try:
        (folders[-1] / DRAIN).write_text(f"{STOP}\n", encoding="utf-8")
    except OSError as error:
        raise LaunchError(
            f"{folders[-1] / DRAIN} cannot be written: {error.strerror}",
            code=ExitCode.PREFLIGHT,
            help="make room or rights there, or stop without a checkpoint: --now",
        ) from error
    step_s = status.progress.step_s if status.progress else None
    pace = f" (a step takes about {step_s:.0f} s)" if step_s else ""
    return f"asked to save a checkpoint and end after this step{pace}"


def _kill(status: RunStatus) -> str:
    holder = lock_holder(status.path)
    if holder is None or holder.pid is None or not holder.held:
        raise LaunchError(f"{status.path} has just ended", code=ExitCode.NOT_FOUND)
    if holder.host != socket.gethostname():
        raise LaunchError(
            f"{status.path} runs on {holder.host}, this is {socket.gethostname()}",
            code=ExitCode.USAGE,
            help=f"stop it there, or leave --now out: {Path(DRAIN)} is a file in the run directory",
        )
    os.kill(holder.pid, signal.SIGTERM)
    return f"process {holder.pid} was told to end"
