"""A worker and its keeper: two processes, so that nothing of a reward outlives its time.

    trainer --- lifeline ---> keeper (a session of its own, adopts orphans)
       |                        | fork
       +------- calls --------> worker: imports the user's file, scores, may do anything

The keeper sleeps until the lifeline breaks (the pool let go of the worker, or the trainer is dead, by whatever
signal) or the worker ends. It then kills everything below it, children that the reward forked and daemonised
included, and goes. It also drains what they print, so that megabytes of it neither block the worker nor fill the disk.
Adopting orphans takes Linux; elsewhere the process group is killed, which misses daemons.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType

from lrscale.keeper import adopt_orphans, die_with_parent, reap_orphans, sweep, watch_end
from lrscale.records import ScoreFailed
from lrscale.reward.messages import (
    answer_to_bytes,
    call_from_bytes,
    greeting_to_bytes,
    read_message,
    write_message,
)
from lrscale.reward.source import Source, SourceSpec

OUTPUT_MIB = 4
"""How far what workers print may make a log grow."""
_LOOK_S = 1.0
"""How often a keeper looks whether its parent is still the trainer, should the lifeline be held by others."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is given beside its source."""

    memory_mib: int = 0
    """Of data; 0 sets no limit."""
    log: str = ""
    """File for what it prints; empty passes it on to this process's stderr."""


def serve(calls: socket.socket, lifeline: Connection, spec: SourceSpec, settings: WorkerSettings) -> None:
    """Body of the process that a pool starts. Does not return."""
    trainer = os.getppid()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    adopt_orphans()
    reads, writes = os.pipe()
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        try:
            lifeline.close()
            os.close(reads)
            _settle(keeper, writes, settings)
            work(calls, spec)
        finally:
            os._exit(0)
    os.close(writes)
    calls.close()
    code = 1
    try:
        code = _Keeper(worker, trainer, lifeline, reads, settings.log).watch()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sweep()
        os._exit(code)


def work(calls: socket.socket, spec: SourceSpec) -> None:
    """Load the source, say how that went, and answer calls until the pool hangs up."""
    own = os.getpid()
    try:
        source = spec.open()
        greeting = greeting_to_bytes(source.needs())
    except BaseException as error:  # noqa: BLE001 - a user's file may raise anything; the pool is told
        words = str(error) if isinstance(error, ValueError) else _last_frames(error)
        write_message(calls, greeting_to_bytes(None, broken=words or type(error).__name__))
        return
    write_message(calls, greeting)
    while (payload := read_message(calls)) is not None:
        answer = _answer(source, payload)
        if os.getpid() != own:  # a child that the reward forked came back from the call
            os._exit(0)
        write_message(calls, answer)


def _answer(source: Source, payload: bytes) -> bytes:
    started = time.perf_counter()
    count = 1
    try:
        samples = call_from_bytes(payload)
        count = len(samples)
        results = list(source.score(samples))
        if len(results) != count:
            raise RuntimeError(f"{len(results)} results for {count} samples")
    except BaseException as error:  # noqa: BLE001 - it is the sample's failure, whatever it is
        results = [ScoreFailed("error", _last_frames(error))] * count
    return answer_to_bytes(results, time.perf_counter() - started)


class _Keeper:
    """Watches over one worker."""

    def __init__(self, worker: int, trainer: int, lifeline: Connection, output: int, log: str) -> None:
        self._worker = worker
        self._trainer = trainer
        self._lifeline = lifeline
        self._output = output
        self._log, self._room = 2, OUTPUT_MIB << 20
        if log:
            with suppress(OSError):  # no such folder, no room: better heard on stderr than nowhere
                self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                self._room -= os.fstat(self._log).st_size

    def watch(self) -> int:
        """Until the worker ends or the lifeline breaks; how the worker ended, as an exit code."""
        poll = select.poll()
        poll.register(self._lifeline.fileno(), select.POLLIN)
        poll.register(self._output, select.POLLIN)
        ended = watch_end(self._worker)
        if ended is not None:
            poll.register(ended, select.POLLIN)
        while True:
            ready = {number for number, _ in poll.poll(1000 * (_LOOK_S if ended is not None else 0.05))}
            if self._output in ready and not self._drain():
                poll.unregister(self._output)
            pid, status = os.waitpid(self._worker, os.WNOHANG)
            if pid:
                self._drain_rest()
                code = os.waitstatus_to_exitcode(status)
                return 128 - code if code < 0 else code
            if self._lifeline.fileno() in ready or os.getppid() != self._trainer:
                return 0
            reap_orphans(self._worker)

    def _drain(self) -> bool:
        """Pass on what was printed, or drop it; False when nobody can print any more."""
        chunk = os.read(self._output, 1 << 16)
        if self._room > 0:
            with suppress(OSError):  # a full disk is not the reward's fault
                os.write(self._log, chunk[: self._room])
                if len(chunk) >= self._room:
                    os.write(
                        self._log, f"\n[more than {OUTPUT_MIB} MiB printed by workers: the rest is dropped]\n".encode()
                    )
        self._room -= len(chunk)
        return bool(chunk)

    def _drain_rest(self) -> None:
        """The last words of a worker that has ended; its children may still hold the pipe, and are not waited for."""
        os.set_blocking(self._output, False)
        with suppress(OSError):
            for _ in range(OUTPUT_MIB << 4):
                if not self._drain():
                    return


def _settle(keeper: int, output: int, settings: WorkerSettings) -> None:
    """Make the forked process a worker: ends with its keeper, its own streams, its limits."""
    die_with_parent()
    if os.getppid() != keeper:
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, number)
    os.close(output)
    os.close(nothing)
    sys.stdout = os.fdopen(1, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings.memory_mib:
        # Data, not address space: libraries reserve far more of that than they use.
        resource.setrlimit(resource.RLIMIT_DATA, (settings.memory_mib << 20,) * 2)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _last_frames(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-8))[-4000:].rstrip()
