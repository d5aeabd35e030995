"""An engine's state on disk: the same form for every kind of engine and any number of ranks.

    rank-00000.safetensors  rank-00001.safetensors ...     flat pieces (lrscale.parallel.shards) of a rank, in parts
    engine.json                                            which kind and how many ranks wrote it, which groups have optimizer state

Names: `weights/NAME`, `optimizer-GROUP/exp_avg.NAME`, `.../exp_avg_sq.NAME`, `.../step.NAME` and, for weights
narrower than float32, `.../master.NAME`. Frozen weights are there too: neither DeepSpeed's universal checkpoints
nor those without frozen parameters bring them back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from lrscale.parallel.engine import ParameterGroup
from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.shards import Piece, PieceFiles, parts_of, write_pieces

FORMAT = 2
_FACTS = "engine.json"


class Stateful(Protocol):
    """What an engine shows of itself to be saved and restored."""

    kind: str
    lockstep: Lockstep

    def trained_groups(self) -> Sequence[ParameterGroup]:
        """The groups that have optimizer state."""
        ...

    def weight_names(self) -> Sequence[str]:
        """All tensors that make up the weights, on whichever rank."""
        ...

    def local_state(self) -> Iterator[Piece]:
        """This rank's pieces; their values are live, or come with a way to assign them."""
        ...

    def prepare_states(self, groups: Sequence[ParameterGroup]) -> None:
        """Fresh optimizer state for these groups, none for the others."""
        ...

    def finish_load(self) -> None:
        """Whatever follows from new pieces: copies of them kept elsewhere."""
        ...


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def save_state(engine: Stateful, folder: Path) -> None:
    """Write this rank's file; the main rank says what the folder holds. Any rank's failure is raised on all."""
    lockstep = engine.lockstep
    ranks = lockstep.ranks

    def write() -> None:
        mine = (piece for piece in engine.local_state() if ranks.is_main or not piece.replicated)
        write_pieces(folder / rank_file(ranks.rank), mine, tick=lockstep.tick)
        if ranks.is_main:
            facts = {"format": FORMAT, "kind": engine.kind, "world_size": ranks.world_size}
            facts["groups"] = list(engine.trained_groups())
            (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    lockstep.together(write)


@torch.no_grad()
def load_state(engine: Stateful, folder: Path) -> None:
    """Restore what any engine on any number of ranks saved there.

    Raises:
        ValueError: the folder has another format, or does not fit the model; nothing was changed.
    """
    files, groups = engine.lockstep.together(lambda: _checked(engine, folder))
    engine.prepare_states(groups)

    def read() -> None:
        for piece in engine.local_state():
            if piece.name in files.names():
                values = files.read(piece.name, piece.start, piece.stop)
            else:  # a tensor that was never stepped has no moments
                values = torch.zeros_like(piece.values)
            (piece.assign or piece.values.copy_)(values)
            engine.lockstep.tick()

    engine.lockstep.together(read)
    engine.finish_load()


def saved_facts(folder: Path) -> dict[str, Any]:
    """What engine.json says. Raises ValueError for another format."""
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    if facts["format"] != FORMAT:
        raise ValueError(
            f"{folder} holds engine state of format {facts['format']}, this lrscale reads {FORMAT}; resume it with the "
            "lrscale that wrote it"
        )
    return facts


def piece_files(folder: Path) -> PieceFiles:
    """The pieces of all ranks that saved there. Raises ValueError where a rank's file is missing."""
    ranks = range(saved_facts(folder)["world_size"])
    return PieceFiles(part for rank in ranks for part in parts_of(folder / rank_file(rank)))


def _checked(engine: Stateful, folder: Path) -> tuple[PieceFiles, list[ParameterGroup]]:
    files = piece_files(folder)
    names = set(files.names())
    problems, wanted = [], set()
    for piece in engine.local_state():
        if not piece.name.startswith("weights/"):
            continue
        wanted.add(piece.name)
        if piece.name not in names:
            problems.append(f"{piece.name}: missing")
        elif (files.shape(piece.name), files.dtype(piece.name)) != (piece.shape, piece.values.dtype):
            problems.append(
                f"{piece.name}: {list(files.shape(piece.name))} {files.dtype(piece.name)} saved, {list(piece.shape)} "
                f"{piece.values.dtype} in the model"
            )
    known = set(engine.weight_names())
    problems += [
        f"{name}: not in the model"
        for name in names
        if name.startswith("weights/") and name.removeprefix("weights/") not in known
    ]
    if problems:
        raise ValueError(
            f"the checkpoint {folder} does not fit the model ({len(problems)} tensors): {'; '.join(problems[:5])}. "
            "Resume with the recipe that wrote it"
        )
    return files, saved_facts(folder)["groups"]
