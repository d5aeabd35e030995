"""The processes of a pool: started, greeted, let go, and buried."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

from lrscale.reward.messages import Channel, greeting_from_bytes
from lrscale.reward.source import Needs, SourceSpec
from lrscale.reward.worker import WorkerSettings, serve

_CONTEXT = multiprocessing.get_context("spawn")  # a fork of a process that runs torch would inherit its locks
_GRACE_S = 3.0
"""For a keeper to kill what is below it; then its group is killed from here."""
_LOOK_S = 0.05


class Worker:
    """A process as the pool knows it."""

    def __init__(self, spec: SourceSpec, settings: WorkerSettings, deadline: float) -> None:
        calls, far_end = socket.socketpair()
        far_lifeline, self._lifeline = _CONTEXT.Pipe(duplex=False)
        self.channel = Channel(calls)
        # Not daemonic, or reward functions could not use multiprocessing; the keeper sees to it that it ends.
        self._process = _CONTEXT.Process(target=serve, args=(far_end, far_lifeline, spec, settings), name="reward")
        self._process.start()
        far_end.close()
        far_lifeline.close()
        self.sentinel = self._process.sentinel
        self.ready = False
        self.deadline: float | None = deadline
        """When what it does now must be done; None while it has nothing to do."""
        self.dismissed = False

    @property
    def idle(self) -> bool:
        return self.ready and not self.dismissed and self.deadline is None

    def let_go(self) -> None:
        """Its keeper kills it and everything below it."""
        self.dismissed = True
        self._lifeline.close()

    def kill(self) -> None:
        """For a keeper that does not do its work."""
        with suppress(OSError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)

    @property
    def ended(self) -> bool:
        return not self._process.is_alive()

    def how_it_ended(self) -> str:
        """For people."""
        code = self._process.exitcode or 0
        if code <= 128:
            return f"the worker ended with exit code {code}"
        with suppress(ValueError):
            name = signal.Signals(code - 128).name
            hint = " (the system kills so when memory runs out)" if name == "SIGKILL" else ""
            return f"the worker was ended by {name}{hint}"
        return f"the worker ended with exit code {code}"

    def release(self) -> None:
        """Forget an ended process."""
        self._lifeline.close()
        self.channel.close()
        self._process.close()


class Crew:
    """All workers of a pool. Touched under the pool's lock."""

    def __init__(self, spec: SourceSpec, settings: WorkerSettings, start_timeout_s: float) -> None:
        self._spec = spec
        self._settings = settings
        self._start_timeout_s = start_timeout_s
        self._workers: list[Worker] = []
        self._leaving: dict[Worker, float] = {}
        self.needs: Needs | None = None
        """What the source needs, once a worker has said so."""
        self.broken = ""
        """Why the last worker that was started could not load the source."""
        self.look_at_ends = False
        """Somebody's end was noticed."""

    @property
    def untried(self) -> bool:
        """Whether no worker has said anything yet."""
        return self.needs is None and not self.broken

    @property
    def hopeless(self) -> bool:
        """Whether nobody is left to score and nobody new could."""
        return bool(self.broken) and not self._workers

    def grow_to(self, count: int, now: float) -> list[Worker]:
        """Start what is missing; the new ones. None while the source cannot be loaded."""
        if self.broken:
            return []
        new = [
            Worker(self._spec, self._settings, now + self._start_timeout_s) for _ in range(count - len(self._workers))
        ]
        self._workers += new
        return new

    def idle(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.idle]

    def greet(self, worker: Worker, message: bytes) -> None:
        """A worker's first words."""
        needs, broken = greeting_from_bytes(message)
        if broken:
            self.broken = broken
            self.let_go(worker, time.monotonic())
            return
        self.needs = needs
        worker.ready, worker.deadline = True, None

    def let_go(self, worker: Worker, now: float) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            self._leaving[worker] = now
            worker.let_go()

    def overdue(self, now: float) -> list[Worker]:
        """Lets go of workers that took too long; these."""
        late = [worker for worker in self._workers if worker.deadline is not None and worker.deadline <= now]
        for worker in late:
            if not worker.ready:
                self.broken = (
                    f"reward: a worker was not ready within reward.pool.start_timeout_s ({self._start_timeout_s:g} s). "
                    "What loads for so long? Raise it if that is meant"
                )
            self.let_go(worker, now)
        return late

    def ended(self, now: float) -> Iterator[Worker]:
        """Workers that are no more, each once; to be released."""
        if self.look_at_ends:
            self.look_at_ends = False
            for worker in [worker for worker in self._workers if worker.ended]:
                self._workers.remove(worker)
                if not worker.ready:
                    self.broken = f"reward: {worker.how_it_ended()}, while it loaded the reward"
                yield worker
        for worker, since in list(self._leaving.items()):
            if now - since > _GRACE_S:
                worker.kill()
            if worker.ended:
                del self._leaving[worker]
                yield worker

    def next_deadline(self, now: float) -> float:
        """Seconds until somebody is overdue, or is to be looked after."""
        if self._leaving:
            return _LOOK_S
        return max(0.0, min((w.deadline - now for w in self._workers if w.deadline is not None), default=60.0))

    def dismiss(self) -> None:
        """Everybody goes; returns when they are gone, or when not even SIGKILL ends them (a disk that does not answer)."""
        now = time.monotonic()
        for worker in list(self._workers):
            self.let_go(worker, now)
        while self._leaving and time.monotonic() - now < 3 * _GRACE_S:
            for worker in self.ended(time.monotonic()):
                worker.release()
            time.sleep(0.002)
