"""Ends a job whose ranks wait for each other, and says who is missing.

Every rank announces where it is (`phase`) and that it moves (`tick`). A thread a rank publishes this every few
seconds to a store that all ranks can read. When its own rank has not moved for the limit, it looks at the
others': while none of them moves either, it writes one message and ends the process; the launcher ends the rest. It works while the main thread is
stuck inside a collective of whichever library: those let other threads run.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from lrscale.parallel.ranks import Ranks

FAILED = 6
_SILENT_BEATS = 4
"""A rank that has not published for so many beats is gone."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself."""

    phase: str
    meetings: int
    """Collectives of the lockstep entered so far: a rank with fewer is one that the others wait for."""
    moved: float
    """Unix time of its last sign of progress."""
    published: float


class Watchdog:
    """Watches the progress of this rank and its peers until `stop`."""

    def __init__(self, ranks: Ranks, store: dist.Store, *, limit_s: float, on_stall: Callable[[str], None]) -> None:
        """`on_stall` is told the message before the process ends with exit code 6."""
        self._ranks = ranks
        self._store = store
        self._limit_s = limit_s
        self._on_stall = on_stall
        self._beat_s = min(5.0, limit_s / 8)
        self._phases = ["start"]
        self._meetings = 0
        self._moved = time.time()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Where this rank is; phases nest."""
        self._phases.append(name)
        self.tick()
        try:
            yield
        finally:
            self._phases.pop()
            self.tick()

    def tick(self) -> None:
        """This rank moves."""
        self._moved = time.time()

    def meet(self) -> None:
        """This rank enters a collective."""
        self._meetings += 1
        self._moved = time.time()

    def stop(self) -> None:
        """No more watching: the job is over."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self._beat_s):
            with suppress(RuntimeError):  # the store went with the main rank; waiting for it is told below
                self._store.set(_key(self._ranks.rank), json.dumps(asdict(self._own())))
            if time.time() - self._moved > self._limit_s and not self._others_move():
                self._end(self._own())

    def _others_move(self) -> bool:
        """Whether some rank still works: to wait for one is no stall."""
        now = time.time()
        others = (self._read(rank) for rank in range(self._ranks.world_size) if rank != self._ranks.rank)
        return any(
            beat is not None
            and now - beat.published < _SILENT_BEATS * self._beat_s
            and now - beat.moved < self._limit_s
            for beat in others
        )

    def _own(self) -> Beat:
        return Beat(" > ".join(self._phases[1:]) or self._phases[0], self._meetings, self._moved, time.time())

    def _end(self, own: Beat) -> None:
        others = {rank: self._read(rank) for rank in range(self._ranks.world_size) if rank != self._ranks.rank}
        try:
            self._on_stall(stall_message(self._ranks.rank, own, others, beat_s=self._beat_s, limit_s=self._limit_s))
        finally:
            os._exit(FAILED)  # the main thread sits in a collective, where no exception reaches it

    def _read(self, rank: int) -> Beat | None:
        """A rank's last words; None where it has none, or the store is gone."""
        try:
            if not self._store.check([_key(rank)]):
                return None
            return Beat(**json.loads(self._store.get(_key(rank))))
        except RuntimeError:
            return None


def open_store(ranks: Ranks, gather: Callable[[bytes], list[bytes]]) -> dist.Store:
    """A store of the watchdogs' own on the main rank, on a free port that `gather` tells the others."""
    timeout = timedelta(seconds=30)
    main = (
        dist.TCPStore(ranks.host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if ranks.is_main else None
    )
    port = int(gather(str(main.port if main else 0).encode())[0])
    return main or dist.TCPStore(ranks.host, port, is_master=False, timeout=timeout)


def stall_message(rank: int, own: Beat, others: dict[int, Beat | None], *, beat_s: float, limit_s: float) -> str:
    """Who waits, where, for how long, and for whom."""
    now = own.published
    gone = [r for r, beat in others.items() if beat is None or now - beat.published > _SILENT_BEATS * beat_s]
    behind = [r for r, beat in others.items() if beat is not None and r not in gone and beat.meetings < own.meetings]
    words = [f"rank {r} (no sign of life)" for r in gone]
    words += [
        f"rank {r} (in {others[r].phase}, last moved {now - others[r].moved:.0f} s ago)"  # type: ignore[union-attr]
        for r in behind
    ]
    if not words:
        ahead = [f"rank {r} in {beat.phase}" for r, beat in others.items() if beat and beat.meetings > own.meetings]
        words = [f"this rank itself, which the others wait for ({'; '.join(ahead)})"] if ahead else ["nobody: all wait"]
    return (
        f"rank {rank} has not moved for {now - own.moved:.0f} s in {own.phase}; missing: {', '.join(words)}. The run "
        f"ends here instead of waiting for ever (parallel.stall_limit_s is {limit_s:g}); launched again, it goes on "
        "from its last checkpoint"
    )


def _key(rank: int) -> str:
    return f"beat/{rank}"
