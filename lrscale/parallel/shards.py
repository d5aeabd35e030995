"""Tensors in pieces: flat ranges of named tensors in safetensors files, whoever wrote them and however many.

A piece is a contiguous range of one flattened tensor. ZeRO-3 cuts tensors by elements, FSDP2 by rows of
dimension 0, one process not at all: each is a flat range, so files written by any of them on any number of
ranks are read by all of them on any other. Only the ranges that are asked for are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from lrscale.parallel.tensor_files import write_tensors

_RANGES, _PART = "ranges", "part"
PART_BYTES = 4 * 2**30
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a flattened tensor, held by this rank."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    values: Tensor
    """[stop - start], 1-D: a view of the live tensor, or a copy of it that comes with `assign`."""
    replicated: bool = False
    """Whether every rank holds the same: the main rank writes it for all."""
    assign: Callable[[Tensor], None] | None = None
    """Puts new values in place; None where `values` is the live tensor."""

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()


class Tensors(Protocol):
    """Named tensors, any flat range of which can be read."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start] values of the flattened tensor."""
        ...


def write_pieces(
    path: Path, pieces: Iterable[Piece], *, part_bytes: int = PART_BYTES, tick: Callable[[], None] = lambda: None
) -> None:
    """The pieces of one rank, in files of about `part_bytes`: what is copied to be written is held a part at a time.

    The first part is `path`, the next ones NAME.part-0001.safetensors and so on; each says whether it is the last.
    `tick` is called after each.
    """
    values: dict[str, Tensor] = {}
    ranges: dict[str, dict[str, Any]] = {}
    number = size = 0

    def flush(*, last: bool) -> None:
        about = {_RANGES: json.dumps(ranges), _PART: json.dumps({"number": number, "last": last})}
        write_tensors(part_path(path, number), values, about)
        tick()

    for piece in pieces:
        if values and size + piece.values.nbytes > part_bytes:
            flush(last=False)
            values, ranges, number, size = {}, {}, number + 1, 0
        # Several names may show one replicated value (Adam's step); safetensors refuses shared memory.
        values[piece.name] = piece.values.clone() if piece.replicated else piece.values
        ranges[piece.name] = {"start": piece.start, "shape": list(piece.shape)}
        size += piece.values.nbytes
    flush(last=True)


def part_path(path: Path, number: int) -> Path:
    """Where the parts of a rank's file lie; `path` itself is the first."""
    return path.with_name(f"{path.stem}.part-{number:04d}{path.suffix}") if number else path


def parts_of(path: Path) -> list[Path]:
    """The parts that `write_pieces` made of `path`, in order. Raises ValueError where one is missing."""
    found: list[Path] = []
    while True:
        part = part_path(path, len(found))
        if not part.is_file():
            raise ValueError(f"{part.parent} lacks {part.name}; restore it")
        found.append(part)
        with safe_open(part, framework="pt") as opened:
            if json.loads((opened.metadata() or {}).get(_PART, '{"last": true}'))["last"]:
                return found


class PieceFiles:
    """Files that `write_pieces` wrote, all of one checkpoint."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._places: dict[str, list[tuple[int, int, Path]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for path in sorted(files):
            with safe_open(path, framework="pt") as opened:
                ranges = json.loads((opened.metadata() or {}).get(_RANGES, "{}"))
                for name, place in ranges.items():
                    count = prod(opened.get_slice(name).get_shape())
                    self._places.setdefault(name, []).append((place["start"], place["start"] + count, path))
                    self._shapes[name] = tuple(place["shape"])
                    self._dtypes[name] = _DTYPES[opened.get_slice(name).get_dtype()]

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Raises ValueError where no file holds a part of the range."""
        parts: list[Tensor] = []
        reached = start
        for first, last, path in sorted(self._places[name]):
            if first <= reached < min(last, stop):
                with safe_open(path, framework="pt") as opened:
                    parts.append(opened.get_slice(name)[reached - first : min(last, stop) - first])
                reached = min(last, stop)
        if reached < stop:
            raise ValueError(f"{name}: values {reached} to {stop} are in none of the checkpoint's files")
        return torch.cat(parts) if parts else torch.empty(0)


class WholeFiles:
    """Ordinary safetensors files: each tensor whole, in one of them (the Hugging Face layout)."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        self._files: dict[str, str | Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict: safetensors' handle only has keys()
                    self._files[name] = path
                    self._shapes[name] = tuple(opened.get_slice(name).get_shape())

    def names(self) -> Sequence[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Reads the rows of dimension 0 that cover the range."""
        shape = self._shapes[name]
        width = prod(shape[1:])
        with safe_open(self._files[name], framework="pt") as opened:
            if not shape:
                return opened.get_tensor(name).reshape(1)[start:stop]
            first, last = start // width, -(-stop // width)
            rows = opened.get_slice(name)[first:last]
        return rows.reshape(-1)[start - first * width : stop - first * width]
