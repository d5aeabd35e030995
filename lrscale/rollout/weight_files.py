"""A publication as a folder, in shared memory or on a file system that trainer and engines share.

Safetensors files, a bucket each, and manifest.json, which is written last. The folder is removed as soon as the engines
have read it, whatever comes of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrscale.rollout.weights import BUCKET_BYTES, Bucket, Buckets, PublicationError, named

MANIFEST = "manifest.json"


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
                Bucket(int(one["number"]), tuple(one["tensors"]), int(one["size_bytes"]), int(one["checksum"]))
                for one in entry["buckets"]
            )
            return cls(int(entry["version"]), bool(entry["projector_only"]), buckets)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PublicationError(f"{path} is no manifest of weights: {error!r}") from error


class WrittenFiles:
    """A Transfer into a folder, which is made anew. OSError where it cannot be written."""

    def __init__(
        self, folder: Path, *, version: int, projector_only: bool = False, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        self._folder = folder
        self._version = version
        self._projector_only = projector_only
        self._buckets = Buckets(self._write, bucket_bytes=bucket_bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        self._buckets.add(name, tensor)

    def finish(self) -> Path:
        """Write what is left; the path of the manifest."""
        self._buckets.flush()
        return Manifest(self._version, self._projector_only, tuple(self._buckets.sent)).write(self._folder)

    def drop(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, bucket: Bucket, tensors: dict[str, Tensor]) -> None:
        try:
            save_file(tensors, bucket_path(self._folder, bucket))
        except RuntimeError as error:  # shared memory that is full reads differently from library to library
            raise OSError(f"{self._folder}: {error}") from error


class ReadFiles:
    """An Incoming publication from a folder."""

    def __init__(self, manifest_path: Path) -> None:
        self._path = manifest_path
        self._manifest = Manifest.read(manifest_path)

    def expect(self, version: int, *, projector_only: bool) -> None:
        """All buckets are read and checked once, before any tensor of the model has moved."""
        found = self._manifest
        if (found.version, found.projector_only) != (version, projector_only):
            raise PublicationError(
                f"weights: announced were {named(version, projector_only=projector_only)}, {self._path} holds "
                f"{named(found.version, projector_only=found.projector_only)}"
            )
        for bucket in found.buckets:
            bucket.check(_read(bucket, self._path.parent).values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As they were checked: nobody writes into a publication that is announced."""
        for bucket in self._manifest.buckets:
            yield from _read(bucket, self._path.parent).items()

    def finish(self) -> None:
        pass

    def refuse(self, words: str) -> None:
        pass


def bucket_path(folder: Path, bucket: Bucket) -> Path:
    return folder / f"bucket-{bucket.number:05d}.safetensors"


def _read(bucket: Bucket, folder: Path) -> dict[str, Tensor]:
    path = bucket_path(folder, bucket)
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    except Exception as error:  # safetensors raises its own kind for a damaged header
        raise PublicationError(f"weights: {path.name} cannot be read: {error}") from error
    if tuple(tensors) != bucket.tensors:
        raise PublicationError(f"weights: {path.name} holds other tensors than its manifest says")
    return tensors
