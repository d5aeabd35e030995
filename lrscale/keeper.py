"""Keeping processes: nothing that a keeper started outlives it, nor its owner.

    owner --- lifeline ---> keeper (a session of its own, adopts orphans)
                              | fork
                              +------> the process that does the work, and whatever that one starts

Reward workers and rollout engines are kept so. Adopting orphans takes Linux; elsewhere the process group is killed,
which misses daemons.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 10.0
"""What a process that was asked to end may take for it."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LOOK_S = 1.0


def adopt_orphans() -> None:
    """Processes below this one come to it when their parents die."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """SIGKILL for this process as soon as its parent is gone. Look at os.getppid() behind it: it may be gone already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def watch_end(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the system has no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def children(of: int | None = None) -> list[int] | None:
    """Of this process, or of another one; None where the system does not tell."""
    pid = os.getpid() if of is None else of
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return None


def sweep() -> None:
    """Kill every process below this one until there is none: orphans come to it as their parents die."""
    while True:
        below = children()
        if below is None:  # no /proc: the group is all that can be named, and this process is part of it
            os.killpg(0, signal.SIGKILL)
            return
        for pid in below:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0 if below else os.WNOHANG)
        except ChildProcessError:
            return


def reap_orphans(but: int) -> None:
    """Adopted processes that have ended, or they would stay as zombies."""
    for pid in children() or ():
        if pid != but:
            with suppress(OSError):
                os.waitpid(pid, os.WNOHANG)


def keep(work: Callable[[], int], *, lifeline: int | None, when_orphaned: Callable[[], None] = lambda: None) -> int:
    """Run `work` in a process below this one; returns its exit code when it, and all that it started, is gone.

    Call it early: the process is forked, so no thread may run yet. It ends when `work` returns, at SIGTERM and SIGINT
    (which are passed on, with `GRACE_S` to obey), when `lifeline`, the read end of a pipe that the owner holds,
    breaks, or when this process's parent ends. A byte in it asks for the end at once. What `work` and its children left
    in shared memory goes with them; `when_orphaned` is called last where the owner is gone.
    """
    parent, keeper = os.getppid(), os.getpid()
    adopt_orphans()
    asked: list[float] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(time.monotonic()))
    worker = os.fork()
    if worker == 0:
        code = 1
        try:
            die_with_parent()
            if os.getppid() == keeper:
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.default_int_handler)
                code = work()
        except KeyboardInterrupt:
            code = 130
        finally:
            sys.stderr.flush()
            os._exit(code)
    shared: set[Path] = set()
    orphaned = True
    try:
        code, orphaned = _watch(worker, parent, lifeline, asked, shared)
        return code
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        shared |= _shared_below(keeper)
        sweep()
        for path in shared:
            path.unlink(missing_ok=True)
        if orphaned:
            when_orphaned()


def _watch(worker: int, parent: int, lifeline: int | None, asked: list[float], shared: set[Path]) -> tuple[int, bool]:
    """Until the worker ends, or has to: its exit code, 128 + signal if it is killed; whether the owner is gone."""
    poll = select.poll()
    if lifeline is not None:
        poll.register(lifeline, select.POLLIN)
    ended = watch_end(worker)
    if ended is not None:
        poll.register(ended, select.POLLIN)
    told = False
    looked = 0.0
    while True:
        ready = {number for number, _ in poll.poll(1000 * (_LOOK_S if ended is not None else 0.05))}
        pid, status = os.waitpid(worker, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return (128 - code if code < 0 else code), False
        if os.getppid() != parent:
            return 128 + signal.SIGKILL, True
        if lifeline is not None and lifeline in ready:
            return 128 + signal.SIGKILL, not os.read(lifeline, 1)
        if asked and not told:
            told = True
            os.kill(worker, signal.SIGTERM)
        if asked and time.monotonic() - asked[0] > GRACE_S:
            return 128 + signal.SIGKILL, False
        if time.monotonic() - looked > _LOOK_S:  # of a worker that is killed nobody can ask any more
            looked = time.monotonic()
            shared |= _shared_below(os.getpid())
        reap_orphans(worker)


def _shared_below(pid: int) -> set[Path]:
    """Files in shared memory that processes below `pid` have mapped."""
    found: set[Path] = set()
    for child in children(pid) or ():
        found |= set(_mapped(child)) | _shared_below(child)
    return found


def _mapped(pid: int) -> Iterator[Path]:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            _, marker, name = line.partition(f" {SHARED_MEMORY}/")
            if marker and not name.endswith(" (deleted)"):
                yield SHARED_MEMORY / name


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
