"""A publication by broadcast: buckets from the trainer's main rank to all workers of all engines at once.

What a bucket consists of goes through the group's store, its bytes through the collective:

    begin {version, projector_only}    bucket {tensors, checksum} + bytes    ...    end {buckets} | abort {why}

Bucket k is on its way while bucket k + 1 is gathered. A worker loads a bucket as soon as it has arrived and was checked:
nothing holds a large model twice. So a publication that breaks off leaves an engine with no weights at all.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lrscale.rollout.weight_group import WeightGroup
from lrscale.rollout.weights import BUCKET_BYTES, Bucket, Buckets, PublicationError, named

_ALIGNMENT = 16
"""Bytes: tensors of all types can begin there."""
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.0005, 0.02


class SentStream:
    """A Transfer of the main rank."""

    def __init__(
        self,
        group: WeightGroup,
        *,
        version: int,
        projector_only: bool = False,
        attend: Callable[[], None] = lambda: None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """`attend` is called while it waits, and raises where waiting is in vain."""
        self._group = group
        self._attend = attend
        self._buckets = Buckets(self._send, device=group.device, bucket_bytes=bucket_bytes)
        self._said: list[str] = []
        self._open = True
        self._say(begin={"version": version, "projector_only": projector_only})

    @property
    def limit_s(self) -> float:
        """Longest wait for a member of the group."""
        return self._group.limit_s

    @property
    def sent(self) -> list[Bucket]:
        return self._buckets.sent

    def add(self, name: str, tensor: Tensor) -> None:
        """RuntimeError where a member of the group is gone, or `attend` raises it."""
        self._buckets.add(name, tensor)

    def finish(self) -> None:
        """Returns when all bytes are sent; what the workers made of them they say themselves."""
        self._buckets.flush()
        self._wait()
        self._say(end={"buckets": len(self.sent)})
        self._open = False

    def drop(self) -> None:
        """Workers give up a publication that is not finished."""
        if self._open:
            self._open = False
            self._say(abort={"why": "the trainer gave it up"})

    def forget(self) -> None:
        """What was said, once every worker has answered."""
        for key in (*self._said, _REFUSED):
            self._group.forget(key)

    def refused(self) -> str | None:
        """A worker's words."""
        return self._group.hear(_REFUSED) if self._group.said(_REFUSED) else None

    def _send(self, bucket: Bucket, tensors: dict[str, Tensor]) -> None:
        self._wait()
        entries = [[name, _dtype_name(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()]
        payload = torch.zeros(_layout(entries)[1], dtype=torch.uint8, device=self._group.device)
        for name, room in _views(payload, entries).items():
            room.copy_(tensors[name])
        # Said first: NCCL connects at the first collective, which returns only when all members have called it.
        self._say(bucket={"tensors": entries, "size_bytes": bucket.size_bytes, "checksum": bucket.checksum})
        self._group.broadcast(payload)

    def _wait(self) -> None:
        pause = _FIRST_LOOK_S
        deadline = time.monotonic() + self._group.limit_s
        while not self._group.idle and time.monotonic() < deadline:
            self._attend()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_LOOK_S)
        self._group.wait()
        self._attend()

    def _say(self, **entry: Mapping[str, Any]) -> None:
        key = _entry(len(self._said))
        self._group.say(key, json.dumps(entry))
        self._said.append(key)


class ReceivedStream:
    """An Incoming publication of a worker."""

    def __init__(self, group: WeightGroup) -> None:
        self._group = group
        self._heard = 0
        self._received = 0
        self._ended = False

    def expect(self, version: int, *, projector_only: bool) -> None:
        begin = self._hear().get("begin")
        if begin != {"version": version, "projector_only": projector_only}:
            raise PublicationError(
                f"weights: announced were {named(version, projector_only=projector_only)}, the trainer at "
                f"{self._group.host} sends {begin}"
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for bucket, tensors in self._buckets():
            if tuple(tensors) != bucket.tensors:
                raise PublicationError(f"weights: bucket {bucket.number} holds other tensors than it says")
            bucket.check(tensors.values())
            yield from tensors.items()

    def finish(self) -> None:
        left = sum(1 for _ in self._buckets())
        if left:
            raise PublicationError(f"weights: {left} buckets of the trainer's were not loaded")

    def refuse(self, words: str) -> None:
        """The trainer hears of it, and until it gives up this worker takes part: nobody hangs in a collective."""
        try:
            self._group.say(_REFUSED, words)
            for _ in self._buckets():
                pass
        except RuntimeError:  # the group has fallen apart, or the trainer gave up
            pass

    def _buckets(self) -> Iterator[tuple[Bucket, dict[str, Tensor]]]:
        """Unchecked, to the end."""
        while not self._ended:
            entry = self._hear()
            if "end" in entry:
                self._ended = True
                if entry["end"]["buckets"] != self._received:
                    raise PublicationError(
                        f"weights: {self._received} of {entry['end']['buckets']} buckets arrived from {self._group.host}"
                    )
                return
            if "bucket" not in entry:
                self._ended = True
                why = entry.get("abort", {}).get("why", "it says something unexpected")
                raise PublicationError(f"weights: no more of them from {self._group.host}: {why}")
            yield self._receive(entry["bucket"])

    def _receive(self, entry: Mapping[str, Any]) -> tuple[Bucket, dict[str, Tensor]]:
        entries = entry["tensors"]
        payload = torch.empty(_layout(entries)[1], dtype=torch.uint8, device=self._group.device)
        try:
            self._group.broadcast(payload)
            self._group.wait()
        except RuntimeError as error:
            raise PublicationError(
                f"weights: bucket {self._received} from the trainer at {self._group.host} did not arrive at member "
                f"{self._group.number}: {_first_line(error)}"
            ) from error
        tensors = _views(payload, entries)
        bucket = Bucket(
            self._received, tuple(sorted(name for name, *_ in entries)), entry["size_bytes"], entry["checksum"]
        )
        self._received += 1
        return bucket, tensors

    def _hear(self) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = json.loads(self._group.hear(_entry(self._heard)))
        except RuntimeError as error:
            raise PublicationError(
                f"weights: nothing more was heard from the trainer at {self._group.host}: {_first_line(error)}"
            ) from error
        self._heard += 1
        return entry


_REFUSED = "refused"


def _entry(number: int) -> str:
    return f"entry/{number}"


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise PublicationError(f"weights: {name!r} is no type of tensors")
    return found


def _layout(entries: list[list[Any]]) -> tuple[list[tuple[int, int]], int]:
    """Where each tensor begins and ends in a bucket's bytes, and how long these are."""
    places, total = [], 0
    for _, dtype, shape in entries:
        size = math.prod(shape) * _dtype(dtype).itemsize
        places.append((total, total + size))
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, max(total, _ALIGNMENT)


def _views(payload: Tensor, entries: list[list[Any]]) -> dict[str, Tensor]:
    """The tensors of a bucket within its bytes."""
    places, _ = _layout(entries)
    return {
        name: payload[start:stop].view(_dtype(dtype)).view(shape)
        for (name, dtype, shape), (start, stop) in zip(entries, places, strict=True)
    }
