"""The engines of a run: brought up, watched over, brought up again.

Engines that this process owns are started here; those of another role of the job (placement `separate`) start
themselves and are found by their address files. Touched by the main rank alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrscale.rollout.vllm.client import EngineError, ask, health
from lrscale.rollout.vllm.process import EngineProcess, read_address

_LOOK_S = 0.2
_SAY_EVERY_S = 10.0
ADDRESS = "*.address.json"


class Requests:
    """POSTs to several engines that are under way."""

    def __init__(self, bodies: Mapping[str, Mapping[str, Any]], path: str, *, timeout_s: float) -> None:
        self._waiting = set(bodies)
        self._answers: dict[str, Any] = {}
        self._failures: dict[str, EngineError] = {}
        for url, body in bodies.items():  # daemons: the end of this process waits for no engine
            threading.Thread(target=self._ask, args=(url, path, body, timeout_s), daemon=True).start()

    @property
    def done(self) -> bool:
        return not self._waiting

    @property
    def waiting(self) -> list[str]:
        """Addresses of those that have not answered."""
        return sorted(self._waiting)

    @property
    def failure(self) -> EngineError | None:
        """Of an engine that has refused, failed or gone, while others may still be at work."""
        return next(iter(self._failures.values()), None)

    def answers(self) -> list[Any]:
        """When all have answered. EngineError where one did not obey."""
        assert self.done
        if self.failure is not None:
            raise self.failure
        return list(self._answers.values())

    def _ask(self, url: str, path: str, body: Mapping[str, Any], timeout_s: float) -> None:
        try:
            self._answers[url] = ask(url, path, body, timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001 - raised by `answers`
            self._failures[url] = error if isinstance(error, EngineError) else EngineError(f"{url}{path}: {error!r}")
        finally:
            self._waiting.discard(url)


class Fleet:
    """See above. `close` it in the end, whatever happened."""

    def __init__(
        self,
        folder: Path,
        count: int,
        owned: Sequence[EngineProcess],
        *,
        start_timeout_s: float,
        say: Callable[[str], None],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """`owned` is empty where the engines belong to another role; `folder` is where addresses lie."""
        self._folder = folder
        self._count = count
        self._owned = list(owned)
        self._start_timeout_s = start_timeout_s
        self._say = say
        self.tick = tick
        self.restarts = 0
        self._were_up: set[str] = set()

    def start(self) -> None:
        """Returns at once: `ready` waits."""
        for engine in self._owned:
            engine.start()

    def addresses(self) -> list[str]:
        """Of the engines that listen."""
        if not self._owned:
            found = [read_address(path) for path in sorted(self._folder.glob(ADDRESS))]
            return [url for url in found if url is not None]
        return [url for url in self._listening().values() if url is not None]

    def _listening(self) -> dict[str, str | None]:
        """This process's engines that live, by name, and where they listen."""
        return {engine.name: engine.url for engine in self._owned if engine.alive}

    def ready(self) -> dict[str, dict[str, Any]]:
        """Wait for all engines; those of this process that were up once and are gone are started anew.

        Raises:
            EngineError: one of them ends while it starts, or they are not there within the limit.
        """
        started = said_at = time.monotonic()
        while True:
            listening = self._listening()
            healthy = _healthy(self.addresses() if not self._owned else listening.values())
            self._mend(listening, healthy)
            if len(healthy) >= self._count:
                return healthy
            now = time.monotonic()
            if now - started > self._start_timeout_s:
                raise EngineError(self._late(len(healthy)))
            if now - said_at > _SAY_EVERY_S:
                said_at = now
                doing = next((f": {engine.doing()}" for engine in self._owned if engine.url is None), "")
                self._say(f"rollout engines: {len(healthy)} of {self._count} ready after {now - started:.0f} s{doing}")
            self.tick()
            time.sleep(_LOOK_S)

    def _mend(self, listening: Mapping[str, str | None], healthy: Mapping[str, Any]) -> None:
        """An engine that was up has met with an accident; one that never was would fail again."""
        for engine in self._owned:
            starting = engine.name in listening and listening[engine.name] is None
            if starting:
                continue
            if listening.get(engine.name) in healthy:
                self._were_up.add(engine.name)
            elif engine.name not in self._were_up:
                raise EngineError(self._failed(engine))
            else:
                engine.kill()
                self._were_up.discard(engine.name)
                self.restarts += 1
                self._say(f"rollout engine {engine.name} is gone and starts anew; its log: {engine.log}")
                engine.start()

    def _failed(self, engine: EngineProcess) -> str:
        code = engine.wait(0)
        how = "failed" if code is None else f"ended with exit code {code}"
        return f"rollout engine {engine.name} {how} while it started; the end of {engine.log}:\n{engine.last_words()}"

    def _late(self, ready: int) -> str:
        given = f"{ready} of {self._count} rollout engines are ready after rollout.start_timeout_s"
        if self._owned:
            slow = next((engine for engine in self._owned if engine.url is None), self._owned[0])
            return f"{given} ({self._start_timeout_s:g}); {slow.name} is at: {slow.doing()}; its log: {slow.log}"
        return (
            f"{given} ({self._start_timeout_s:g}); they are to write their addresses to {self._folder}: does a role "
            "of cluster.split run `lrscale serve-rollouts`?"
        )

    def close(self) -> None:
        """End the engines that belong to this process."""
        for engine in self._owned:
            engine.stop()

    def ask(self, urls: Sequence[str], path: str, body: dict[str, Any], *, timeout_s: float) -> Requests:
        """The same request to several engines at a time; returns at once."""
        return Requests(dict.fromkeys(urls, body), path, timeout_s=timeout_s)

    def tell(self, urls: Sequence[str], path: str, body: dict[str, Any], *, timeout_s: float) -> list[Any]:
        """`ask`, and wait for the answers; EngineError where one of them does not obey."""
        requests = self.ask(urls, path, body, timeout_s=timeout_s)
        while not requests.done:
            self.tick()
            time.sleep(0.01)
        return requests.answers()


def _healthy(urls: Iterable[str | None]) -> dict[str, dict[str, Any]]:
    """What the engines that answer, and have not failed, say of themselves."""
    answers = {url: health(url) for url in urls if url is not None}
    return {url: said for url, said in answers.items() if said is not None and said["state"] != "failed"}
