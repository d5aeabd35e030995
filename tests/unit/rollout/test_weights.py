"""Publications: what is written is what is read, or nothing is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrscale.rollout.weight_files import Manifest, ReadFiles, WrittenFiles, bucket_path
from lrscale.rollout.weights import PublicationError, checksum, publication

WEIGHTS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.bias": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}


class Gathered:
    """Parameters as an engine hands them out: a tensor is whole until the next is asked for."""

    def __init__(self) -> None:
        self.ended = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in WEIGHTS.items():
            lent = tensor.clone()
            yield name, lent
            lent.zero_()
        self.ended = True


def test_a_publication_holds_what_was_gathered_and_leaves_nothing(tmp_path: Path):
    """Locks out tensors that were released before they were written, and files that stay in shared memory."""
    folder = tmp_path / "v3"
    with publication(Gathered(), lambda: WrittenFiles(folder, version=3, bucket_bytes=40)) as written:
        assert isinstance(written, WrittenFiles)
        path = written.finish()
        read = ReadFiles(path)
        read.expect(3, projector_only=False)
        found = dict(read.tensors())
        assert len(Manifest.read(path).buckets) == 2
        assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
        for version, projector_only in ((4, False), (3, True)):
            with pytest.raises(PublicationError, match="announced were version"):
                read.expect(version, projector_only=projector_only)
    assert list(tmp_path.iterdir()) == []
    broken = publication(Gathered(), lambda: WrittenFiles(folder, version=4))
    with pytest.raises(RuntimeError, match="engine"), broken:
        raise RuntimeError("the engine is gone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [None, "file/beneath"])
def test_every_rank_gathers_to_the_end(folder: str | None, tmp_path: Path):
    """Locks out ranks that hang in a gather which the main rank, whose disk is full, has left."""
    (tmp_path / "file").write_text("not a folder")
    parameters = Gathered()
    begin = None if folder is None else lambda: WrittenFiles(tmp_path / folder, version=1)
    with publication(parameters, begin) as written:
        assert parameters.ended
        assert written is None if folder is None else isinstance(written, OSError)


def test_damage_is_found_before_anything_is_loaded(tmp_path: Path):
    """Locks out weights with a flipped bit, swapped buckets, or a bucket less."""
    with publication(Gathered(), lambda: WrittenFiles(tmp_path / "v1", version=1)) as written:
        assert isinstance(written, WrittenFiles)
        manifest_path = written.finish()
        read = ReadFiles(manifest_path)
        (bucket,) = Manifest.read(manifest_path).buckets
        path = bucket_path(tmp_path / "v1", bucket)
        sound = path.read_bytes()
        for place in (len(sound) - 1, len(sound) - 40):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
            with pytest.raises(PublicationError, match="arrived damaged"):
                read.expect(1, projector_only=False)
        path.write_bytes(sound[:-1])
        with pytest.raises(PublicationError, match="cannot be read"):
            read.expect(1, projector_only=False)
        path.unlink()
        with pytest.raises(PublicationError, match="cannot be read"):
            read.expect(1, projector_only=False)
        path.write_bytes(sound)
        read.expect(1, projector_only=False)


def test_a_checksum_sees_places_and_lengths():
    """A plain sum would not tell two swapped values, nor a tensor that lost its zeros."""
    values = torch.arange(64, dtype=torch.float32)
    swapped = values.clone()
    swapped[[3, 40]] = swapped[[40, 3]]
    shorter = torch.cat([values, torch.zeros(2)])
    distinct = {checksum([t]) for t in (values, swapped, shorter, values.double(), values[1:])}
    assert len(distinct) == 5
    assert checksum([values[:32], values[32:]]) != checksum([values[32:], values[:32]])
    odd = torch.arange(9, dtype=torch.uint8)
    assert checksum([odd[1:]]) == checksum([odd[1:].clone()]) != checksum([odd[:-1]])
