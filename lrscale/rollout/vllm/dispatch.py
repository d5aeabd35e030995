"""Hands sequences to engines and takes them back as they finish: balanced, timed, each answer once.

Rows travel in calls of a few, so that an engine's connection is no bottleneck; the engine with the least outstanding
work gets the next call. What a dead engine or a late call leaves unfinished goes to another one; an answer that comes
twice counts once.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from lrscale.rollout.vllm.client import HEALTH_S, PLAIN, EngineError


@dataclass(slots=True)
class Row:
    """A sequence to be sampled."""

    key: int
    prompt: Sequence[int]
    """As the engine reads it, latent positions included."""
    seed: int
    tries: int = 0
    why: str = ""
    """What went wrong the last time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How rows are handed out."""

    timeout_s: float
    """Of one sequence, waiting for its turn in the engine included."""
    tries: int = 3
    """A row that fails so often while its engine lives ends the run."""
    rows_a_call: int = 8
    window: int = 512
    """Rows that one caller has outstanding at one engine."""


@dataclass(slots=True)
class _Lane:
    url: str
    outstanding: int = 0
    alive: bool = True


@dataclass(slots=True)
class Round:
    """One attempt to get all rows from the engines that live. Iterate it; then look at `left` and `stats`."""

    rows: Sequence[Row]
    urls: Sequence[str]
    sampling: Mapping[str, Any]
    limits: Limits
    tick: Callable[[], None] = lambda: None
    first: int = 0
    """Where to begin among equally free engines: callers that share them begin at different ones."""
    left: list[Row] = field(default_factory=list)
    """Rows that no engine was left for."""
    retried: int = 0
    _done: set[int] = field(default_factory=set)
    _task: asyncio.Task[None] | None = None
    _answers: queue.SimpleQueue[tuple[str, dict[str, Any]] | BaseException | None] = field(
        default_factory=queue.SimpleQueue
    )

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(engine, its answer), each row once; {latents} of an answer are safetensors, None where it has none.

        Raises:
            EngineError: a row failed `limits.tries` times on engines that live.
        """
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._run, args=(loop,), name="rollout-dispatch", daemon=True)
        thread.start()
        try:
            while True:
                try:
                    item = self._answers.get(timeout=1.0)
                except queue.Empty:
                    self.tick()
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            loop.call_soon_threadsafe(self._cancel)
            thread.join()
            loop.close()

    # What follows runs in the thread.

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        self._task = loop.create_task(self._hand_out())
        try:
            loop.run_until_complete(self._task)
            self._answers.put(None)
        except asyncio.CancelledError:
            self._answers.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._answers.put(error)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _hand_out(self) -> None:
        lanes = [_Lane(url) for url in (*self.urls[self.first :], *self.urls[: self.first])]
        waiting = deque(self.rows)
        running: dict[asyncio.Task[list[Row]], _Lane] = {}
        async with httpx2.AsyncClient(
            timeout=httpx2.Timeout(self.limits.timeout_s, connect=HEALTH_S),
            trust_env=False,
            verify=PLAIN,
            limits=_NO_LIMITS,
        ) as client:
            try:
                while waiting or running:
                    while waiting and (lane := self._freest(lanes)) is not None:
                        call = [waiting.popleft() for _ in range(min(self.limits.rows_a_call, len(waiting)))]
                        lane.outstanding += len(call)
                        running[asyncio.create_task(self._call(client, lane, call))] = lane
                    if not running:
                        break  # nobody is left to ask
                    finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in finished:
                        del running[task]
                        again = task.result()
                        self.retried += len(again)
                        waiting.extend(again)
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
        self.left = list(waiting)

    def _freest(self, lanes: Sequence[_Lane]) -> _Lane | None:
        alive = [lane for lane in lanes if lane.alive and lane.outstanding < self.limits.window]
        return min(alive, key=lambda lane: lane.outstanding, default=None)

    async def _call(self, client: httpx2.AsyncClient, lane: _Lane, call: Sequence[Row]) -> list[Row]:
        """One call to its end; the rows that have to be tried again."""
        open_rows = {row.key: row for row in call}
        why = "the engine ended the call too soon"
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                async for answer in self._stream(client, lane.url, call):
                    row = open_rows.get(answer.get("key", -1))
                    if row is None:
                        continue
                    if "error" in answer or answer.get("finish_reason") not in ("stop", "length"):
                        row.why = str(answer.get("error", f"finish_reason {answer.get('finish_reason')}"))
                        continue
                    if answer["latents"]:
                        answer["latents"] = await self._latents(client, lane.url, answer["request"])
                    del open_rows[row.key]
                    lane.outstanding -= 1
                    if row.key not in self._done:
                        self._done.add(row.key)
                        self._answers.put((lane.url, answer))
        except TimeoutError:
            why = f"no answer within rollout.request_timeout_s ({self.limits.timeout_s:g} s)"
        except (httpx2.HTTPError, ValueError, EngineError) as error:
            why = f"{type(error).__name__}: {error}"
        lane.outstanding -= len(open_rows)
        if open_rows:
            lane.alive = await _lives(client, lane.url)
        return [self._again(row, why, lane) for row in open_rows.values()]

    def _again(self, row: Row, why: str, lane: _Lane) -> Row:
        row.why = row.why or why
        if lane.alive:  # a dead engine is no fault of the row
            row.tries += 1
            if row.tries >= self.limits.tries:
                raise EngineError(
                    f"rollout: a sequence failed {row.tries} times; the last time at {lane.url}: {row.why}. Raise "
                    "rollout.request_timeout_s where sequences take longer, or look at the engine's log"
                )
        row.why = ""
        return row

    async def _stream(self, client: httpx2.AsyncClient, url: str, call: Sequence[Row]) -> AsyncIterator[dict[str, Any]]:
        rows = [{"key": row.key, "prompt": list(row.prompt), "seed": row.seed} for row in call]
        async with client.stream(
            "POST", f"{url}/generate", json={"rows": rows, "sampling": dict(self.sampling)}
        ) as response:
            if response.status_code != 200:
                raise EngineError((await response.aread())[:300].decode(errors="replace"))
            async for line in response.aiter_lines():
                if line:
                    yield json.loads(line)

    async def _latents(self, client: httpx2.AsyncClient, url: str, request: str) -> bytes:
        """At once: they are gone when their engine is."""
        response = await client.post(f"{url}/latents", json={"requests": [request]})
        if response.status_code != 200:
            raise EngineError(f"the latents of a finished sequence: {response.text[:300]}")
        return response.content


_NO_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=None)


async def _lives(client: httpx2.AsyncClient, url: str) -> bool:
    try:
        answer = await client.get(f"{url}/health", timeout=HEALTH_S)
        return answer.status_code == 200 and answer.json()["state"] == "ready"
    except (httpx2.HTTPError, ValueError, KeyError):
        return False
