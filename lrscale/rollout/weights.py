"""Publication: the trained weights on their way from the trainer to rollout engines.

    full_parameters() --> buckets with checksums --> manifest --> each engine checks, loads, echoes the version
    (gathered, collective)   (the main rank)                      --> probe: log-probs of fixed prompts, compared

A publication is a folder in shared memory: safetensors files and manifest.json. It is removed as soon as the engines
have read it, whatever comes of it. The iterator of parameters is taken to its end on every rank, here and nowhere
else, so nobody but this file decides how long a gathered tensor lives.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BUCKET_BYTES = 256 * 2**20
MANIFEST = "manifest.json"
_STRIDE = 1 << 22
"""Words that are summed at a time, 32 MiB."""
_MASK = (1 << 63) - 1


class PublicationError(RuntimeError):
    """Weights arrived damaged, in another version, or an engine computes something else with them."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A file of a publication."""

    file: str
    tensors: tuple[str, ...]
    size_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a publication consists of."""

    version: int
    projector_only: bool
    buckets: tuple[Bucket, ...]

    @property
    def size_bytes(self) -> int:
        return sum(bucket.size_bytes for bucket in self.buckets)

    def write(self, folder: Path) -> Path:
        """Written last: a folder without it is no publication."""
        path = folder / MANIFEST
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises PublicationError where there is none, or it is none of ours."""
        try:
            entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            buckets = tuple(
                Bucket(str(one["file"]), tuple(one["tensors"]), int(one["size_bytes"]), int(one["checksum"]))
                for one in entry["buckets"]
            )
            return cls(int(entry["version"]), bool(entry["projector_only"]), buckets)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PublicationError(f"{path} is no manifest of weights: {error!r}") from error


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
            factors = torch.arange(1, 2 * len(piece), 2, device=words.device)
            part = _mixed(part, int((piece * factors).sum()))
        total = _mixed(total, part * (2 * number + 1))
    return total


def _mixed(total: int, part: int) -> int:
    return (total * 0x9E3779B97F4A7C15 + part) & _MASK


class BucketWriter:
    """Collects tensors into safetensors files of about `bucket_bytes`."""

    def __init__(self, folder: Path, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._folder = folder
        self._limit = bucket_bytes
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._buckets: list[Bucket] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy: the tensor may be gone after the call."""
        if self._tensors and self._bytes + tensor.nbytes > self._limit:
            self._flush()
        self._tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += tensor.nbytes

    def finish(self, version: int, *, projector_only: bool) -> Path:
        """Write what is left; the path of the manifest."""
        if self._tensors:
            self._flush()
        return Manifest(version, projector_only, tuple(self._buckets)).write(self._folder)

    def _flush(self) -> None:
        file = f"bucket-{len(self._buckets):05d}.safetensors"
        save_file(self._tensors, self._folder / file)
        names = tuple(sorted(self._tensors))
        self._buckets.append(Bucket(file, names, self._bytes, checksum(self._tensors[name] for name in names)))
        self._tensors, self._bytes = {}, 0


def read_publication(manifest: Manifest, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in the trainer, a bucket in memory at a time.

    Raises:
        PublicationError: a bucket is missing or is not what the trainer wrote. `check_publication` looks at all of
            them before the first one is used.
    """
    for bucket in manifest.buckets:
        yield from _checked(bucket, folder).items()


def check_publication(manifest: Manifest, folder: Path) -> None:
    """Read every bucket once. PublicationError where one is damaged."""
    for bucket in manifest.buckets:
        _checked(bucket, folder)


def _checked(bucket: Bucket, folder: Path) -> dict[str, Tensor]:
    try:
        with safe_open(folder / bucket.file, framework="pt") as opened:
            names = tuple(sorted(opened.keys()))
            tensors = {name: opened.get_tensor(name) for name in names}
    except Exception as error:  # safetensors raises its own kind for a damaged header
        raise PublicationError(f"weights: {bucket.file} cannot be read: {error}") from error
    if names != bucket.tensors:
        raise PublicationError(f"weights: {bucket.file} holds other tensors than its manifest says")
    found = checksum(tensors.values())
    if found != bucket.checksum:
        raise PublicationError(
            f"weights: {bucket.file} ({len(names)} tensors, {names[0]} first) arrived damaged: "
            f"checksum {found:016x}, the trainer's is {bucket.checksum:016x}"
        )
    return tensors


@contextmanager
def publication(
    parameters: Iterable[tuple[str, Tensor]],
    folder: Path | None,
    *,
    version: int,
    projector_only: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Path | OSError | None]:
    """Write the parameters to `folder` for the time of the block.

    Every rank calls it, and takes `parameters` to their end, since each tensor is gathered from all of them; the rank
    that has a `folder` writes. It is given the manifest's path, or what kept it from being written: then the block has
    to tell the other ranks. Afterwards the folder is gone.
    """
    failure: OSError | None = None
    manifest: Path | None = None
    try:
        writer = None
        if folder is not None:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, mode=0o700)
                writer = BucketWriter(folder)
            except OSError as error:
                failure = error
        for name, tensor in parameters:
            tick()
            if writer is not None and failure is None:
                try:
                    writer.add(name, tensor)
                except (OSError, RuntimeError) as error:
                    failure = _as_os_error(error, folder)
        if writer is not None and failure is None:
            try:
                manifest = writer.finish(version, projector_only=projector_only)
            except (OSError, RuntimeError) as error:
                failure = _as_os_error(error, folder)
        yield failure or manifest
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _as_os_error(error: Exception, folder: Path | None) -> OSError:
    """Shared memory that is full reads differently from library to library."""
    return error if isinstance(error, OSError) else OSError(f"{folder}: {error}")
