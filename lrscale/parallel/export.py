"""Models in the Hugging Face layout from a stream of whole tensors: one file's worth in memory at a time.

model-00001-of-00002.safetensors ... model.safetensors.index.json     (a single file keeps its short name)
config.json  generation_config.json  tokenizer files
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor

from lrscale.parallel.checkpoint import sync
from lrscale.parallel.engine import Engine
from lrscale.parallel.tensor_files import write_tensors
from lrscale.parallel.turns import state_buffers

MAX_SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"


def export_model(engine: Engine, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """The engine's policy, whole or not at all, on the disk for good on return. Collective; the main rank writes."""
    lockstep = engine.lockstep
    temporary = folder.with_name(f".tmp-{folder.name}")
    lockstep.on_main(lambda: _begin(engine, temporary))
    writer = ShardWriter(temporary, max_shard_bytes)
    failure: OSError | None = None
    if lockstep.ranks.is_main:
        for name, buffer in state_buffers(engine.policy):
            writer.add(name, buffer)
    for name, tensor in engine.full_parameters():  # to its end on every rank: each tensor is gathered from all
        lockstep.tick()
        if lockstep.ranks.is_main and failure is None:
            try:
                writer.add(name, tensor)
            except OSError as error:
                failure = error

    def finish() -> None:
        if failure is not None:
            raise failure
        writer.finish()
        put_in_place(temporary, folder)

    lockstep.on_main(finish)


def _begin(engine: Engine, temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    engine.policy.save_config(temporary)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a folder that is complete, after everything in it is on the disk."""
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync(folder.parent)


class ShardWriter:
    """Collects tensors into files of at most `max_shard_bytes` (one larger tensor is a file of its own)."""

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = max_shard_bytes
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._total_bytes = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy: the tensor may be gone after the call."""
        if self._tensors and self._bytes + tensor.nbytes > self._limit:
            self._flush()
        self._tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and the names that the Hugging Face layout wants."""
        if self._tensors:
            self._flush()
        count = len(self._files)
        if count == 1:
            self._part(1).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._files, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        self._files.append(list(self._tensors))
        write_tensors(self._part(len(self._files)), self._tensors, {"format": "pt"})
        self._tensors, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.safetensors"
