"""Flat pieces: what W ranks wrote, V ranks read, each no more than its own part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lrscale.parallel.shards import Piece, PieceFiles, WholeFiles, parts_of, write_pieces


def _cut(tensor: torch.Tensor, name: str, ranks: int) -> list[Piece]:
    """As ZeRO-3 cuts: parts of ceil(n / ranks) values, the last ones shorter or empty."""
    flat = tensor.flatten()
    size = -(-flat.numel() // ranks)
    return [
        Piece(name, tuple(tensor.shape), min(r * size, flat.numel()), flat[r * size : (r + 1) * size])
        for r in range(ranks)
    ]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=3),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
)
def test_any_number_of_ranks_reads_what_any_number_wrote(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], writers: int, readers: int
):
    """An element lost or doubled at a cut would be a wrong weight that nothing else notices."""
    folder = tmp_path_factory.mktemp("pieces")
    tensor = torch.randn(shape)
    pieces = _cut(tensor, "weights/x", writers)
    for rank, piece in enumerate(pieces):
        write_pieces(folder / f"rank-{rank}.safetensors", [piece] if piece.values.numel() else [])
    files = PieceFiles(folder.glob("rank-*.safetensors"))
    assert files.names() == ["weights/x"] and files.shape("weights/x") == tuple(shape)
    again = [files.read("weights/x", p.start, p.stop) for p in _cut(tensor, "weights/x", readers) if p.values.numel()]
    assert torch.equal(torch.cat(again), tensor.flatten())


def test_a_missing_file_is_named_not_filled_with_zeros(tmp_path: Path):
    for rank, piece in enumerate(_cut(torch.arange(10.0), "w", 3)):
        write_pieces(tmp_path / f"rank-{rank}.safetensors", [piece])
    files = PieceFiles([tmp_path / "rank-0.safetensors", tmp_path / "rank-2.safetensors"])
    with pytest.raises(ValueError, match="w: values 4 to 10 are in none"):
        files.read("w", 0, 10)


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=0, max_size=3), data=st.data())
def test_any_range_of_a_whole_tensor(tmp_path_factory: pytest.TempPathFactory, shape: list[int], data: st.DataObject):
    """A rank reads its flat part of a matrix, which begins and ends in the middle of rows."""
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    tensor = torch.randn(shape, dtype=torch.float32).to(torch.bfloat16)
    save_file({"x": tensor}, path)
    start = data.draw(st.integers(0, tensor.numel() - 1))
    stop = data.draw(st.integers(start + 1, tensor.numel()))
    read = WholeFiles([path]).read("x", start, stop)
    assert read.dtype == torch.bfloat16 and torch.equal(read, tensor.flatten()[start:stop])


def test_a_large_rank_writes_parts_and_a_lost_one_is_missed(tmp_path: Path):
    """A 70B rank's state copied whole before it is written is as much host memory again; a part that is lost must not
    be taken for moments that never were."""
    tensors = {f"weights/{name}": torch.randn(10) for name in "abcde"}
    pieces = [Piece(name, (10,), 0, tensor) for name, tensor in tensors.items()]
    ticks: list[int] = []
    write_pieces(tmp_path / "rank-00000.safetensors", pieces, part_bytes=90, tick=lambda: ticks.append(1))
    parts = parts_of(tmp_path / "rank-00000.safetensors")
    assert len(parts) == len(ticks) == 3
    files = PieceFiles(parts)
    assert all(torch.equal(files.read(name, 0, 10), tensor) for name, tensor in tensors.items())
    parts[-1].unlink()
    with pytest.raises(ValueError, match=r"lacks rank-00000.part-0002.safetensors"):
        parts_of(tmp_path / "rank-00000.safetensors")
