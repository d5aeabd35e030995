"""How a publication gets to the engines of a fleet: the main rank's part.

    Files      written to a folder, then each engine is told where it lies     engines see the folder
    Broadcast  each engine is told to listen, then buckets are broadcast       engines are anywhere in the network

An engine takes the weights while nothing is sampled, and answers when it has them all (routes.py: POST /weights).
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from lrscale.rollout.vllm.client import EngineError, health
from lrscale.rollout.vllm.fleet import Fleet, Requests
from lrscale.rollout.weight_files import WrittenFiles
from lrscale.rollout.weight_group import Meeting, WeightGroup
from lrscale.rollout.weight_stream import SentStream
from lrscale.rollout.weights import BUCKET_BYTES, PublicationError, Transfer, named

_LOOK_S = 0.01
_GIVE_UP_S = 10.0
"""For engines to say what they know of a broadcast that broke off."""


class Transport(Protocol):
    """A way for weights to reach engines."""

    def begin(self, urls: Sequence[str], *, version: int, projector_only: bool) -> Transfer:
        """To these engines; they have the weights when the transfer's `finish` returns.

        Raises:
            EngineError, PublicationError, OSError: they cannot be reached this way; from the transfer's methods too.
        """
        ...

    def close(self) -> None:
        """Nothing of it stays."""
        ...


class Files:
    """Through a folder that the engines can read."""

    def __init__(self, fleet: Fleet, folder: Path, *, timeout_s: float) -> None:
        """`timeout_s`: of an engine that loads."""
        self._fleet = fleet
        self._folder = folder
        self._timeout_s = timeout_s

    def begin(self, urls: Sequence[str], *, version: int, projector_only: bool) -> Transfer:
        files = WrittenFiles(self._folder / f"v{version}", version=version, projector_only=projector_only)

        def deliver(manifest: Path) -> None:
            body = {"manifest": str(manifest), "version": version, "projector_only": projector_only}
            self._fleet.tell(urls, "/weights", body, timeout_s=self._timeout_s)

        return _ByFiles(files, deliver)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class _ByFiles:
    def __init__(self, files: WrittenFiles, deliver: Callable[[Path], None]) -> None:
        self._files = files
        self._deliver = deliver

    def add(self, name: str, tensor: Tensor) -> None:
        self._files.add(name, tensor)

    def finish(self) -> None:
        self._deliver(self._files.finish())

    def drop(self) -> None:
        self._files.drop()


class Broadcast:
    """In a process group with the engines' workers, which lasts until an engine is replaced or a broadcast fails."""

    def __init__(
        self,
        fleet: Fleet,
        device: torch.device,
        *,
        workers: int,
        limit_s: float,
        timeout_s: float,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """`workers` of each engine; `limit_s` for a bucket, `timeout_s` for a publication. `device` is the trainer's."""
        self._fleet = fleet
        self._device = device
        self._workers = workers
        self._limit_s = limit_s
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._group: WeightGroup | None = None
        self._members: list[str] = []
        self.groups_formed = 0

    def begin(self, urls: Sequence[str], *, version: int, projector_only: bool) -> Transfer:
        group = self._group_of(list(urls))
        body = {"group": group.token, "version": version, "projector_only": projector_only}
        requests = self._fleet.ask(urls, "/weights", body, timeout_s=self._timeout_s)
        what = f"{named(version, projector_only=projector_only)} from {group.host} to {', '.join(urls)}"
        attend = self._attendant(requests, what)
        stream = SentStream(
            group, version=version, projector_only=projector_only, attend=attend, bucket_bytes=self._bucket_bytes
        )
        return _ByBroadcast(stream, requests, attend, what, self._leave)

    def close(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._members = None, []

    def _group_of(self, urls: list[str]) -> WeightGroup:
        """The group of exactly these engines, formed anew where one of them is not in it."""
        group = self._group
        if group is not None and urls == self._members:
            said = [health(url) for url in urls]
            if all(one is not None and one["group"] == group.token for one in said):
                return group
        self._leave()
        self._group, self._members = self._formed(urls), urls
        self.groups_formed += 1
        return self._group

    def _formed(self, urls: list[str]) -> WeightGroup:
        meeting = Meeting([_place(url) for url in urls], self._workers, self._device, self._limit_s)
        token = secrets.token_hex(8)
        bodies = {url: asdict(meeting.invitation(token, place)) for place, url in enumerate(urls)}
        requests = Requests(bodies, "/group", timeout_s=self._limit_s)
        host = meeting.invitation(token, 0).host
        attend = self._attendant(requests, f"a group of {host} and {', '.join(urls)}")
        started = time.monotonic()
        while absent := meeting.absent(token):
            attend()
            if time.monotonic() - started > self._limit_s:
                missing = ", ".join(urls[place] for place in absent)
                raise PublicationError(f"weights by broadcast: {missing} did not come to {host} in {self._limit_s:g} s")
            time.sleep(_LOOK_S)
        group = meeting.join(token)
        while not requests.done:
            attend()
            time.sleep(_LOOK_S)
        attend()
        return group

    def _attendant(self, requests: Requests, what: str) -> Callable[[], None]:
        def attend() -> None:
            self._fleet.tick()
            if requests.failure is not None:
                raise PublicationError(f"weights by broadcast: {what}: {requests.failure}")

        return attend


class _ByBroadcast:
    def __init__(
        self,
        stream: SentStream,
        requests: Requests,
        attend: Callable[[], None],
        what: str,
        leave: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._requests = requests
        self._attend = attend
        self._what = what
        self._leave = leave
        self._whole = False
        self._torn = False

    def add(self, name: str, tensor: Tensor) -> None:
        self._explained(lambda: self._stream.add(name, tensor))
        refused = self._stream.refused()
        if refused is not None:
            raise PublicationError(f"weights by broadcast: {self._what}: {refused}")

    def finish(self) -> None:
        self._explained(self._stream.finish)
        limit_s = self._stream.limit_s
        started = time.monotonic()
        while not self._requests.done:
            self._attend()
            if time.monotonic() - started > limit_s:
                silent = ", ".join(self._requests.waiting)
                raise PublicationError(
                    f"weights by broadcast: {self._what}: all is sent, but {silent} gave no answer in {limit_s:g} s"
                )
            time.sleep(_LOOK_S)
        self._attend()
        self._stream.forget()
        self._whole = True

    def drop(self) -> None:
        """Of a broadcast that broke off the group is given up too, for nobody knows who stands where in it."""
        if self._whole:
            return
        self._stream.drop()
        started = time.monotonic()
        while not (self._torn or self._requests.done) and time.monotonic() - started < _GIVE_UP_S:
            time.sleep(_LOOK_S)
        self._leave()  # which ends the wait of workers in a collective that cannot come about

    def _explained(self, work: Callable[[], Any]) -> None:
        """What the backend says of a broken connection names neither end."""
        try:
            work()
        except PublicationError:
            raise
        except RuntimeError as error:
            self._torn = True
            why = self._requests.failure or str(error).split("\n", 1)[0]
            raise PublicationError(f"weights by broadcast: {self._what}: {why}") from error


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.hostname is None or parts.port is None:
        raise EngineError(f"{url} is no address of an engine")
    return parts.hostname, parts.port
