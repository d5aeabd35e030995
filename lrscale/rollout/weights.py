"""Publication: the trained weights on their way from the trainer to rollout engines.

    full_parameters() --> buckets with checksums --> a transport --> each engine checks, loads, echoes the version
    (gathered, collective)   (the main rank)                         --> probe: log-probs of fixed prompts, compared

A transport carries the buckets: as files (lrscale.rollout.weight_files) or by a collective with the engines' workers
(lrscale.rollout.weight_stream). What a worker is told and checks is the same for both. The iterator of parameters is
taken to its end on every rank, here and nowhere else, so nobody but this file decides how long a gathered tensor lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

BUCKET_BYTES = 256 * 2**20
_STRIDE = 1 << 20
"""Words that are summed at a time, 8 MiB: their factors are kept, and stay in the cache."""
_MASK = (1 << 63) - 1


class PublicationError(RuntimeError):
    """Weights arrived damaged, in another version, or an engine computes something else with them."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some tensors of a publication, which travel together."""

    number: int
    tensors: tuple[str, ...]
    """Names, sorted."""
    size_bytes: int
    checksum: int
    """Of the tensors in that order."""

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Raises PublicationError where these are not the bytes that the trainer sent."""
        found = checksum(tensors)
        if found != self.checksum:
            raise PublicationError(
                f"weights: bucket {self.number} ({len(self.tensors)} tensors, {self.tensors[0]} first) arrived damaged: "
                f"checksum {found:016x}, the trainer's is {self.checksum:016x}"
            )


class Transfer(Protocol):
    """A publication under way, seen from the rank that sends."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy: the tensor may be gone after the call."""
        ...

    def finish(self) -> Any:
        """All tensors were added."""
        ...

    def drop(self) -> None:
        """It is over, whatever came of it: nothing of it stays."""
        ...


class Incoming(Protocol):
    """A publication seen from a worker that loads it."""

    def expect(self, version: int, *, projector_only: bool) -> None:
        """Raises PublicationError where it is another one than announced, or is known to be damaged."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name in the trainer, a bucket in memory at a time, checked before it is handed out.

        Raises:
            PublicationError: a bucket is missing or is not what the trainer sent.
        """
        ...

    def finish(self) -> None:
        """All of it was loaded. Raises PublicationError where there was more."""
        ...

    def refuse(self, words: str) -> None:
        """It cannot be loaded: let nobody wait for this worker."""
        ...


Sent = TypeVar("Sent", bound=Transfer)


def named(version: int, *, projector_only: bool) -> str:
    """A publication for people."""
    return f"version {version}{' of the projector' if projector_only else ''}"


def checksum(tensors: Iterable[Tensor]) -> int:
    """Of the bytes of the tensors in order; any changed, moved or missing byte changes it with near certainty.

    Sums of 8-byte words, each times an odd number that depends on its place, modulo 2**64: as fast as memory is read,
    on whatever device the tensors are.
    """
    total = 0
    for number, tensor in enumerate(tensors, start=1):
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        tail = raw.numel() % 8
        if tail:
            raw = torch.cat([raw, raw.new_zeros(8 - tail)])
        elif raw.storage_offset() % 8:
            raw = raw.clone()
        words = raw.view(torch.int64)
        part = raw.numel()
        for start in range(0, len(words), _STRIDE):
            piece = words[start : start + _STRIDE]
            factors = _factors(words.device)[: len(piece)]
            # There is no product of whole numbers on GPUs; on CPUs it is three times as fast as their sum.
            summed = torch.dot(piece, factors) if words.device.type == "cpu" else (piece * factors).sum()
            part = _mixed(part, int(summed))
        total = _mixed(total, part * (2 * number + 1))
    return total


@lru_cache(maxsize=2)
def _factors(device: torch.device) -> Tensor:
    """[_STRIDE] odd numbers."""
    return torch.arange(1, 2 * _STRIDE, 2, device=device)


def _mixed(total: int, part: int) -> int:
    return (total * 0x9E3779B97F4A7C15 + part) & _MASK


class Buckets:
    """Collects tensors into buckets of about `bucket_bytes` and hands each to `send`."""

    def __init__(
        self,
        send: Callable[[Bucket, dict[str, Tensor]], None],
        *,
        device: torch.device | str = "cpu",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._send = send
        self._device = device
        self._limit = bucket_bytes
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self.sent: list[Bucket] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy: the tensor may be gone after the call."""
        if self._tensors and self._bytes + tensor.nbytes > self._limit:
            self.flush()
        self._tensors[name] = tensor.detach().to(self._device, copy=True).contiguous()
        self._bytes += tensor.nbytes

    def flush(self) -> None:
        """Send what is left."""
        if not self._tensors:
            return
        tensors = dict(sorted(self._tensors.items()))
        bucket = Bucket(len(self.sent), tuple(tensors), self._bytes, checksum(tensors.values()))
        self._tensors, self._bytes = {}, 0
        self._send(bucket, tensors)
        self.sent.append(bucket)


@contextmanager
def publication(
    parameters: Iterable[tuple[str, Tensor]],
    begin: Callable[[], Sent] | None,
    *,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Sent | Exception | None]:
    """Add the parameters to the transfer that `begin` makes, which lasts as long as the block.

    Every rank calls it, and takes `parameters` to their end, since each tensor is gathered from all of them; the rank
    that has a way to `begin` sends. It is given the transfer, still to be finished, or what kept it from being sent:
    then the block has to tell the other ranks.
    """
    transfer: Sent | None = None
    failure: Exception | None = None
    try:
        if begin is not None:
            try:
                transfer = begin()
            except (OSError, RuntimeError) as error:
                failure = error
        for name, tensor in parameters:
            tick()
            if transfer is not None and failure is None:
                try:
                    transfer.add(name, tensor)
                except (OSError, RuntimeError) as error:
                    failure = error
        yield failure or transfer
    finally:
        if transfer is not None:
            transfer.drop()
