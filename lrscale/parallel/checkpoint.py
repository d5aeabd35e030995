"""Checkpoints that are whole or absent: temporary name, fsync, checksums, rename.

checkpoints/
  step-10/  manifest.json  state.json  engine.json  weights.safetensors  optimizer-*.safetensors
  step-20/  ...
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.parallel.engine import Engine

_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEMPORARY = ".tmp-"
_REPLACED = ".old-"
_MANIFEST = "manifest.json"
_STATE = "state.json"
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


class CheckpointStore:
    """The checkpoints of one folder, the newest `keep_last` of them kept. One process writes at a time."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last: given {keep_last}, needed at least 1")
        self.folder = Path(folder)
        self.keep_last = keep_last

    def save(self, name: str, engine: Engine, state: dict[str, Any]) -> Path:
        """Write engine and `state` (JSON values) as the newest checkpoint; one of the same name is replaced.

        Raises CheckpointError when the disk refuses, ValueError for a bad name or a state that is not JSON.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"checkpoint name {name!r}: letters, digits, dot, dash, underscore; no leading dot")
        text = json.dumps(state, indent=2, allow_nan=False) + "\n"
        temporary = self.folder / (_TEMPORARY + name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean_up()
            temporary.mkdir()
            engine.save(temporary)
            (temporary / _STATE).write_text(text, encoding="utf-8")
            self._seal(temporary, name)
            self._put_in_place(temporary, name)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(self._refusal(name, engine, error)) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.prune()
        return self.folder / name

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None without one. Damaged ones are skipped with a warning."""
        if not self.folder.is_dir():
            return None
        self._recover_replaced()
        for path in self._folders():
            if _sequence(path) is None:
                _warn_damaged(path, f"{_MANIFEST} is missing or unreadable")
        for checkpoint in reversed(self._listed()):
            damage = _damage(checkpoint.folder)
            if damage is None:
                return checkpoint
            _warn_damaged(checkpoint.folder, damage)
        return None

    def load(self, checkpoint: Checkpoint, engine: Engine) -> dict[str, Any]:
        """Restore the engine; returns the state given to `save`."""
        engine.load(checkpoint.folder)
        return json.loads((checkpoint.folder / _STATE).read_text(encoding="utf-8"))

    def _seal(self, temporary: Path, name: str) -> None:
        """Everything on disk for good, then a manifest that says what a whole checkpoint looks like."""
        files = {}
        for path in sorted(temporary.iterdir()):
            sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        sequence = max((one.sequence for one in self._listed()), default=0) + 1
        manifest = {"format": _FORMAT, "name": name, "sequence": sequence, "files": files}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        sync(temporary / _MANIFEST)
        sync(temporary)

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
        for path in self.folder.glob(_TEMPORARY + "*"):
            shutil.rmtree(path)

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
        found = [Checkpoint(path.name, path, number) for path, number in sequences.items() if number is not None]
        return sorted(found, key=lambda one: one.sequence)

    def prune(self) -> None:
        """Remove all but the newest `keep_last`. Damaged ones are not counted, and go with their age.

        Only sizes are looked at: for use after a save, when the newest is known to be whole.
        """
        listed = self._listed() if self.folder.is_dir() else []
        whole = [one for one in listed if _damage(one.folder, checksums=False) is None]
        if not whole:
            return
        oldest_kept = whole[-self.keep_last :][0].sequence
        for checkpoint in listed:
            if checkpoint.sequence >= oldest_kept:
                continue
            doomed = self.folder / (_TEMPORARY + checkpoint.name)
            checkpoint.folder.rename(doomed)  # so that a kill in mid-removal leaves no half checkpoint under its name
            shutil.rmtree(doomed, ignore_errors=True)

    def _refusal(self, name: str, engine: Engine, error: OSError) -> str:
        reason = _NO_ROOM.get(error.errno or 0)
        if reason is None:
            return f"checkpoint {name} could not be written to {self.folder}: {error}; former checkpoints are untouched"
        needed = sum(tensor.nbytes for tensors in engine.state_tensors().values() for tensor in tensors.values())
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


def _damaged_file(folder: Path, files: dict[str, dict[str, Any]], *, checksums: bool) -> str | None:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
        found = _sha256(path) if checksums else expected["sha256"]
        if found != expected["sha256"]:
            return f"{name} has sha256 {found}, written was {expected['sha256']}"
    return None


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
