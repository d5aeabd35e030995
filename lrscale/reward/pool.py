"""A pool of killable workers: samples go in as they finish, results come back in any order, matched by key.

One thread of the trainer starts workers, hands out calls, reads answers and kills what takes too long; it sleeps in
`select` between events, so it costs decoding nothing. Every worker has a socket of its own: killing one can neither
lock nor garble what the others say.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lrscale.records import Score, ScoreFailed
from lrscale.reward.crew import Crew, Worker
from lrscale.reward.limits import Limits, Pace
from lrscale.reward.messages import answer_from_bytes, call_to_bytes, sample_to_json
from lrscale.reward.source import Needs, Passing, Result, Sample, SourceSpec
from lrscale.reward.stats import ScoringStats
from lrscale.reward.worker import WorkerSettings


@dataclass(slots=True)
class _Item:
    """A sample on its way."""

    key: Hashable
    prompt_id: str
    payload: str
    """The sample as it is sent."""
    since: float
    retry: int = 0
    alone: bool = False
    """It was in a call that failed as a whole, and must take no other along again."""


def _item(key: Hashable, sample: Sample) -> _Item:
    return _Item(key, sample.prompt.prompt_id, sample_to_json(sample), time.monotonic())


class Pool:
    """Scores samples in worker processes. One caller's thread; results are waited for with `wait`."""

    def __init__(self, spec: SourceSpec, limits: Limits, settings: WorkerSettings | None = None) -> None:
        """Starts the workers and returns at once; `needs` waits for the first of them."""
        self.limits = limits
        self._crew = Crew(spec, settings or WorkerSettings(), limits.start_timeout_s)
        self._pace = Pace(limits.rate_per_s)
        self._changed = threading.Condition()
        self._fresh: deque[_Item] = deque()
        self._again: list[tuple[float, int, _Item]] = []
        """(when, number, sample) of what is to be tried again, as a heap."""
        self._numbers = itertools.count()
        self._whole: deque[list[_Item]] = deque()
        """Batches that the caller put together."""
        self._running: dict[Worker, list[_Item]] = {}
        self._done: dict[Hashable, Score | ScoreFailed] = {}
        self._outstanding = 0
        self._stats = ScoringStats()
        self._busy_since = 0.0
        self._closing = False
        self._flush = False
        self._crash: BaseException | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._supervise, name="reward-pool", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    def needs(self, *, on_wait: Callable[[], None] = lambda: None) -> Needs:
        """What the source needs of the data, once a worker has loaded it.

        Raises:
            ValueError: it cannot be loaded.
        """
        with self._changed:
            while self._crew.needs is None and not self._crew.broken:
                self._raise_crash()
                self._changed.wait(0.5)
                on_wait()
            if self._crew.needs is None:
                raise ValueError(self._crew.broken)
            return self._crew.needs

    def submit(self, key: Hashable, sample: Sample) -> None:
        """Hand in a sample; the pool puts it into a call with whatever else waits. ValueError for odd columns."""
        self._take_in([_item(key, sample)])

    def submit_together(self, samples: Sequence[tuple[Hashable, Sample]]) -> None:
        """Hand in samples that make up one call, in this order, for sources whose arithmetic depends on the batch."""
        self._take_in([_item(key, sample) for key, sample in samples], together=True)

    def wait(self, timeout_s: float) -> bool:
        """Wait for everything handed in; whether it is all there. Incomplete batches wait no longer."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._raise_crash()
            self._flush = True
            self._wake()
            while self._outstanding:
                self._raise_crash()
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def take(self) -> dict[Hashable, Score | ScoreFailed]:
        """The results that are there, each once, in the order in which they came."""
        with self._changed:
            self._raise_crash()
            done, self._done = self._done, {}
            return done

    def take_stats(self) -> ScoringStats:
        """What was counted since the last call."""
        with self._changed:
            stats, self._stats = self._stats, ScoringStats()
            return stats

    def close(self) -> None:
        """Kill the workers and everything below them; returns when they are gone. What waits is dropped."""
        atexit.unregister(self.close)
        with self._changed:
            if not self._closing:
                self._closing = True
                self._wake()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _take_in(self, items: list[_Item], *, together: bool = False) -> None:
        with self._changed:
            self._raise_crash()
            if not self._outstanding:
                self._busy_since = time.monotonic()
            self._crew.broken = ""  # a file that was mended meanwhile gets another chance
            self._outstanding += len(items)
            self._flush = False
            if together:
                self._whole.append(items)
            else:
                self._fresh.extend(items)
            waiting = len(self._fresh) + len(self._again) + sum(map(len, self._whole))
            self._stats.queue_max = max(self._stats.queue_max, waiting)
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # there is enough to wake the thread
            os.write(self._wake_write, b".")

    def _raise_crash(self) -> None:
        if self._closing:
            raise RuntimeError("the reward pool is closed")
        if self._crash is not None:
            raise RuntimeError(f"the reward pool failed: {self._crash!r}") from self._crash

    # What follows runs in the pool's own thread.

    def _supervise(self) -> None:
        try:
            while not self._closing:
                with self._changed:
                    pause_s = self._look_around(time.monotonic())
                self._listen(pause_s)
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            with self._changed:
                self._crash = error
                self._changed.notify_all()
        finally:
            self._crew.dismiss()
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _look_around(self, now: float) -> float:
        """Kill, start, hand out; the seconds until something of this is due again."""
        for worker in self._crew.overdue(now):
            self._unregister(worker)
            self._lost(worker, ScoreFailed("timeout", f"no answer within {self.limits.timeout_s:g} s"))
        for worker in self._crew.ended(now):
            self._unregister(worker)
            self._lost(worker, ScoreFailed("error", worker.how_it_ended()))
            worker.release()
            self._stats.restarts += 1
        if self._crew.broken:
            self._changed.notify_all()
        if self._crew.hopeless:
            self._give_up(self._crew.broken)
        wanted = self.limits.workers if self._crew.untried else min(self.limits.workers, self._demand())
        for worker in self._crew.grow_to(wanted, now):
            self._selector.register(worker.channel, selectors.EVENT_READ, worker)
            self._selector.register(worker.sentinel, selectors.EVENT_READ)
        pause_s = self._hand_out(now)
        return min(pause_s, self._crew.next_deadline(now))

    def _listen(self, pause_s: float) -> None:
        for key, events in self._selector.select(pause_s):
            if key.fd == self._wake_read:
                os.read(self._wake_read, 4096)
            elif key.data is None:
                self._crew.look_at_ends = True
            elif events & selectors.EVENT_WRITE:
                key.data.channel.flush()
                self._watch(key.data)
            else:
                with self._changed:
                    self._hear(key.data)

    def _hear(self, worker: Worker) -> None:
        try:
            messages = worker.channel.receive()
        except EOFError:  # its end is told by its keeper
            self._selector.unregister(worker.channel)
            return
        for message in messages:
            try:
                if not worker.ready:
                    self._crew.greet(worker, message)
                    self._changed.notify_all()
                elif worker in self._running and not worker.dismissed:
                    self._answered(worker, message)
            except (ValueError, KeyError, TypeError):
                self._crew.let_go(worker, time.monotonic())  # whoever speaks there, it is no worker of ours

    def _hand_out(self, now: float) -> float:
        """Calls to idle workers; the seconds until the next one may be due."""
        allowed = self.limits.concurrency or self.limits.workers
        for worker in self._crew.idle():
            if len(self._running) >= allowed:
                break
            wait_s = self._pace.wait(now)
            if wait_s > 0:
                return wait_s if self._demand() else 60.0
            items = self._next_call(now)
            if items is None:
                break
            self._pace.take(now)
            self._running[worker] = items
            worker.deadline = now + self.limits.timeout_s
            worker.channel.send(call_to_bytes([item.payload for item in items]))
            self._watch(worker)
        return self._next_due(now)

    def _next_call(self, now: float) -> list[_Item] | None:
        """What goes to a worker next; None where nothing is due."""
        size = self.limits.batch_size
        if self._whole:
            return self._whole.popleft()
        call: list[_Item] = []
        while self._again and self._again[0][0] <= now and len(call) < size:
            if call and self._again[0][2].alone:
                break
            call.append(heapq.heappop(self._again)[2])
            if call[-1].alone:
                break
        if call:
            return call
        full = len(self._fresh) >= size
        if not self._fresh or not (full or self._flush or now - self._fresh[0].since >= self.limits.max_wait_s):
            return None
        return [self._fresh.popleft() for _ in range(min(size, len(self._fresh)))]

    def _next_due(self, now: float) -> float:
        """Until a back-off or the wait for a batch is over; long where nothing waits for the clock."""
        due = [self._again[0][0]] if self._again else []
        due += [self._fresh[0].since + self.limits.max_wait_s] if self._fresh else []
        return min((max(moment - now, 0.001) for moment in due if moment > now), default=60.0)

    def _answered(self, worker: Worker, message: bytes) -> None:
        items = self._running[worker]
        results, seconds = answer_from_bytes(message, len(items))
        del self._running[worker]
        worker.deadline = None
        self._stats.work_s += seconds
        for item, result in zip(items, results, strict=True):
            self._stats.took(item.prompt_id, seconds)
            self._settle(item, result)
        if any(isinstance(result, ScoreFailed) and "MemoryError" in result.detail for result in results):
            self._crew.let_go(worker, time.monotonic())  # what it still holds would fail the next sample as well

    def _settle(self, item: _Item, result: Result) -> None:
        if isinstance(result, Passing):
            if item.retry < self.limits.retries:
                item.retry += 1
                self._try_again(item, time.monotonic() + self.limits.wait_before(item.retry, result.retry_after_s))
                self._stats.retries += 1
                return
            tries = f"\n(tried {item.retry + 1} times)" if item.retry else ""
            result = ScoreFailed(result.failure.kind, result.failure.detail + tries)
        self._done[item.key] = result
        self._stats.samples += 1
        if isinstance(result, ScoreFailed):
            self._stats.failed[result.kind] += 1
        self._outstanding -= 1
        if not self._outstanding:
            self._stats.busy_s += time.monotonic() - self._busy_since
            self._changed.notify_all()

    def _lost(self, worker: Worker, failure: ScoreFailed) -> None:
        """A worker has gone with its call. Of several samples one may be to blame: each is tried by itself."""
        items = self._running.pop(worker, [])
        if failure.kind == "timeout":
            self._stats.work_s += self.limits.timeout_s * bool(items)
        for item in items:
            if len(items) > 1:
                item.alone = True
                self._try_again(item, 0.0)
            else:
                seconds = self.limits.timeout_s if failure.kind == "timeout" else 0.0
                self._stats.took(item.prompt_id, seconds)
                self._settle(item, failure)

    def _give_up(self, why: str) -> None:
        """The source cannot be loaded: nothing that waits can be scored."""
        again = (item for _, _, item in self._again)
        waiting = [*self._fresh, *again, *(item for items in self._whole for item in items)]
        self._fresh.clear()
        self._again.clear()
        self._whole.clear()
        for item in waiting:
            self._settle(item, ScoreFailed("error", why))

    def _demand(self) -> int:
        return len(self._fresh) + len(self._again) + len(self._whole) + len(self._running)

    def _try_again(self, item: _Item, ready_at: float) -> None:
        heapq.heappush(self._again, (ready_at, next(self._numbers), item))

    def _watch(self, worker: Worker) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.channel.unsent else 0)
        with suppress(KeyError):
            self._selector.modify(worker.channel, wanted, worker)

    def _unregister(self, worker: Worker) -> None:
        for file in (worker.channel, worker.sentinel):
            with suppress(KeyError, ValueError):
                self._selector.unregister(file)
