"""Checkpoints that are whole or absent: temporary name, fsync, checksums, rename.

checkpoints/
  step-10/  manifest.json  state.json  engine.json  rank-00000.safetensors  rank-00000.json  rank-00001.safetensors ...
  step-20/  ...
  latest                   names step-20
  .tmp-step-30/            being written, or left behind by a killed process
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.parallel.engine import Engine
from lrscale.parallel.lockstep import ALONE, Lockstep, PeerError
from lrscale.parallel.rng import restore_rng, rng_state

_FORMAT = 2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEMPORARY = ".tmp-"
_DOOMED = ".gone-"
"""A checkpoint that is being removed."""
_REPLACED = ".old-"
_CHUNK = 16 * 2**20
_MANIFEST = "manifest.json"
_STATE = "state.json"
_LATEST = "latest"
"""Names the newest checkpoint, for people and scripts; written last. Resuming trusts the manifests."""
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is too large",
}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Those written before are untouched."""


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint is skipped, so that a run goes on from an older one."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    name: str
    folder: Path
    sequence: int
    """Counts the store's checkpoints from 1: the highest is the newest, whatever clocks say."""
    score: float | None = None
    """How good the policy was, where `save` was told."""


class CheckpointStore:
    """The checkpoints of one folder: the newest `keep_last` and the `keep_best` with the highest scores are kept.

    One job writes at a time, all of its ranks together: methods are collective over `lockstep`.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_best: int = 0, *, lockstep: Lockstep = ALONE) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last: given {keep_last}, needed at least 1")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._lockstep = lockstep

    def save(self, name: str, engine: Engine, state: dict[str, Any], *, score: float | None = None) -> Path:
        """Write engine and `state` (JSON values) as the newest checkpoint; one of the same name is replaced.

        Raises CheckpointError, on all ranks, when the disk refuses any of them; ValueError for a bad name or a
        state that is not JSON.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"checkpoint name {name!r}: letters, digits, dot, dash, underscore; no leading dot")
        text = json.dumps(state, indent=2, allow_nan=False) + "\n"
        temporary = self.folder / (_TEMPORARY + name)
        lockstep = self._lockstep
        try:
            lockstep.on_main(lambda: self._make(temporary))
            engine.save(temporary)
            files = lockstep.together(lambda: self._finish_own_files(temporary, text))
            merged = {name: facts for part in lockstep.gather_json(files) for name, facts in part.items()}
            lockstep.on_main(lambda: self._seal(temporary, name, merged, score))
        except (OSError, PeerError) as error:
            lockstep.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise CheckpointError(self._refusal(name, engine, error)) from error
        except BaseException:
            if lockstep.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.prune()
        return self.folder / name

    def latest(self, *, mend: bool = True) -> Checkpoint | None:
        """The newest whole checkpoint; None without one. Damaged ones are skipped with a warning.

        Every rank reads and checks its share of the files. `mend` undoes what a killed job left half done: for the
        job itself, not for those who look at a run that may be going on.
        """
        for name, sequence, files in self._lockstep.on_main(lambda: self._candidates(mend=mend)):
            folder = self.folder / name
            damage = self._damage_anywhere(folder, files)
            if damage is None:
                return Checkpoint(name, folder, sequence)
            if self._lockstep.ranks.is_main:
                _warn_damaged(folder, damage)
        return None

    def load(self, checkpoint: Checkpoint, engine: Engine) -> dict[str, Any]:
        """Restore the engine and this rank's random generators; returns the state given to `save`."""
        engine.load(checkpoint.folder)
        own = checkpoint.folder / _rng_file(self._lockstep.ranks.rank)
        if own.is_file():  # another number of ranks: the new ones begin with generators of their own
            restore_rng(json.loads(own.read_text(encoding="utf-8")))
        return self._lockstep.on_main(lambda: json.loads((checkpoint.folder / _STATE).read_text(encoding="utf-8")))

    def _make(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean_up()
        temporary.mkdir()

    def _finish_own_files(self, temporary: Path, state: str) -> dict[str, dict[str, Any]]:
        """Everything of this rank on disk for good; sizes and checksums of its files."""
        ranks = self._lockstep.ranks
        (temporary / _rng_file(ranks.rank)).write_text(json.dumps(rng_state()), encoding="utf-8")
        own = [path for path in temporary.iterdir() if path.name.startswith(f"rank-{ranks.rank:05d}.")]
        if ranks.is_main:
            (temporary / _STATE).write_text(state, encoding="utf-8")
            own += [path for path in temporary.iterdir() if not path.name.startswith("rank-")]
        files = {}
        for path in sorted(own):
            sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path, self._lockstep.tick)}
        return files

    def _seal(self, temporary: Path, name: str, files: dict[str, dict[str, Any]], score: float | None) -> None:
        """A manifest that says what the whole checkpoint looks like, then the checkpoint's own name."""
        sequence = max((one.sequence for one in self._listed()), default=0) + 1
        manifest = {"format": _FORMAT, "name": name, "sequence": sequence, "score": score, "files": files}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        sync(temporary / _MANIFEST)
        sync(temporary)
        self._put_in_place(temporary, name)
        pointer = self.folder / (_TEMPORARY + _LATEST)
        pointer.write_text(name + "\n", encoding="utf-8")
        sync(pointer)
        pointer.replace(self.folder / _LATEST)

    def _candidates(self, *, mend: bool) -> list[tuple[str, int, dict[str, dict[str, Any]]]]:
        """(name, sequence, files) of what has a readable manifest, the newest first."""
        if not self.folder.is_dir():
            return []
        if mend:
            self._recover_replaced()
        for path in self._folders():
            if _sequence(path) is None:
                _warn_damaged(path, f"{_MANIFEST} is missing or unreadable")
        found = []
        for one in reversed(self._listed()):
            damage = _damage(one.folder, checksums=False)
            if damage is None:
                found.append((one.name, one.sequence, _read_manifest(one.folder)["files"]))
            else:
                _warn_damaged(one.folder, damage)
        return found

    def _damage_anywhere(self, folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
        ranks = self._lockstep.ranks
        mine = dict(list(files.items())[ranks.rank :: ranks.world_size])
        found = _damaged_file(folder, mine, checksums=True, tick=self._lockstep.tick)
        return next(filter(None, self._lockstep.gather_json(found)), None)

    def _put_in_place(self, temporary: Path, name: str) -> None:
        target, replaced = self.folder / name, self.folder / (_REPLACED + name)
        if target.exists():
            target.rename(replaced)  # a folder that is not empty cannot be renamed over
        temporary.rename(target)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _clean_up(self) -> None:
        """Remove what a killed process left behind."""
        self._recover_replaced()
        for path in (*self.folder.glob(_TEMPORARY + "*"), *self.folder.glob(_DOOMED + "*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _recover_replaced(self) -> None:
        """Finish or undo a replacement that was cut off between its two renames."""
        for path in self.folder.glob(_REPLACED + "*"):
            target = self.folder / path.name.removeprefix(_REPLACED)
            if target.exists():
                shutil.rmtree(path)
            else:
                path.rename(target)

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if not path.name.startswith(".") and path.is_dir()]

    def _listed(self) -> list[Checkpoint]:
        """Folders with a readable manifest, whole or not, the newest last."""
        sequences = {path: _sequence(path) for path in self._folders()}
        found = [
            Checkpoint(path.name, path, number, _read_manifest(path).get("score"))
            for path, number in sequences.items()
            if number is not None
        ]
        return sorted(found, key=lambda one: one.sequence)

    def prune(self) -> None:
        """Remove all but what is kept. Damaged ones are not counted, and go with their age.

        Only sizes are looked at: for use after a save, when the newest is known to be whole.
        """
        self._lockstep.on_main(self._prune)

    def _prune(self) -> None:
        listed = self._listed() if self.folder.is_dir() else []
        whole = [one for one in listed if _damage(one.folder, checksums=False) is None]
        if not whole:
            return
        oldest_kept = whole[-self.keep_last :][0].sequence
        scored = sorted((one for one in whole if one.score is not None), key=lambda one: (one.score, one.sequence))
        best = {one.name for one in scored[len(scored) - self.keep_best :]} if self.keep_best else set()
        for checkpoint in listed:
            if checkpoint.sequence >= oldest_kept or checkpoint.name in best:
                continue
            doomed = self.folder / (_DOOMED + checkpoint.name)
            checkpoint.folder.rename(doomed)  # so that a kill in mid-removal leaves no half checkpoint under its name
            shutil.rmtree(doomed, ignore_errors=True)

    def _refusal(self, name: str, engine: Engine, error: OSError | PeerError) -> str:
        reason = _NO_ROOM.get(error.errno or 0) if isinstance(error, OSError) else None
        if reason is None:
            return f"checkpoint {name} could not be written to {self.folder}: {error}; former checkpoints are untouched"
        needed = sum(piece.values.nbytes for piece in engine.local_state())
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        return (
            f"checkpoint {name} could not be written: {reason} ({error.strerror}). Needed about "
            f"{_mib(needed)} in {self.folder}, free {_mib(free)}. Former checkpoints are untouched; "
            "make room (or raise the quota or the file size limit) and launch the run again: it resumes"
        )


def _damage(folder: Path, *, checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole. Without checksums only sizes count."""
    try:
        manifest = _read_manifest(folder)
        if manifest["format"] != _FORMAT:
            return f"{_MANIFEST}: format {manifest['format']}, this lrscale reads {_FORMAT}"
        return _damaged_file(folder, manifest["files"], checksums=checksums)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST}: {type(error).__name__} {error}"


def _damaged_file(
    folder: Path, files: dict[str, dict[str, Any]], *, checksums: bool, tick: Callable[[], None] = lambda: None
) -> str | None:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
        found = _sha256(path, tick) if checksums else expected["sha256"]
        if found != expected["sha256"]:
            return f"{name} has sha256 {found}, written was {expected['sha256']}"
    return None


def _rng_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))


def _sequence(folder: Path) -> int | None:
    """The folder's place in the order of writing; None where its manifest cannot be read."""
    try:
        return int(_read_manifest(folder)["sequence"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _warn_damaged(folder: Path, damage: str) -> None:
    warnings.warn(f"checkpoint {folder} is damaged and skipped: {damage}", DamagedCheckpointWarning, stacklevel=3)


def _sha256(path: Path, tick: Callable[[], None]) -> str:
    """`tick` is called now and then: files of a large model take minutes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            tick()
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
