"""The run's folder: seen by every node with the same content, and with room for the checkpoints."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

from lrscale.config.diagnosis import Check
from lrscale.config.recipe import Recipe
from lrscale.stages.preflight.model_size import ModelSize, checkpoint_bytes

_PATIENCE_S = 30.0
"""Network file systems show a new file to other nodes only after seconds."""
_SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "fuse.glusterfs", "cifs", "panfs", "virtiofs"}


def check_room(recipe: Recipe, run_dir: Path, size: ModelSize) -> Check:
    """Free space for what the run will write, what it has written already taken off."""
    try:
        present = sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*") if path.is_file())
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        return Check("disk", "not checked", f"{run_dir}: {error.strerror}")
    each, needed = size.state_bytes, checkpoint_bytes(recipe, size) - present
    words = f"{_gib(free)} free in {run_dir} (a quota is not seen)"
    needed_words = f"about {_gib(max(needed, 0))} more: {_gib(each)} a checkpoint, {_count(size.parameters)} parameters"
    if free >= needed:
        return Check("disk", "ok", f"{words}, {needed_words}")
    help_ = "make room, lower checkpoints.keep_last or keep_best, or choose another folder: --runs-dir"
    return Check("disk", "failed", words, needed=needed_words, help=help_)


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that holds an existing path; empty where the system does not tell."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    real = os.path.realpath(path)
    holding = [(len(fields[1]), fields[2]) for fields in lines if _holds(fields[1].replace("\\040", " "), real)]
    return max(holding, default=(0, ""))[1]


def check_shared(recipe: Recipe, path: Path) -> Check:
    """Whether the folder's file system is one that nodes share, by its type: nodes themselves are asked in the job."""
    kind = file_system(path)
    if recipe.cluster.nodes == 1 or not kind:
        return Check(
            "shared folder", "not checked", "one node" if kind else "the system does not tell its file systems"
        )
    if kind in _SHARED:
        return Check("shared folder", "ok", f"{path} is on {kind}; every node is asked when the job starts")
    return Check(
        "shared folder",
        "warning",
        f"{path} is on {kind}, which other nodes may not see",
        help="choose a shared folder (--runs-dir), unless you know that this one is; every node is asked in the job",
    )


class Canary:
    """A folder beside the run's files in which each node writes a word and looks for the others'."""

    def __init__(self, run_dir: Path, word: str) -> None:
        """`word` comes from the main rank by another way than the file system."""
        self.folder = run_dir / f".preflight-{word[:8]}"
        self._word = word

    @staticmethod
    def fresh_word() -> str:
        return secrets.token_hex(16)

    def put(self, name: str) -> None:
        """This node's file, on the disk for good. Raises OSError."""
        self.folder.mkdir(exist_ok=True)
        with (self.folder / name).open("w", encoding="utf-8") as file:
            file.write(f"{self._word} {name}\n")
            file.flush()
            os.fsync(file.fileno())

    def problem_with(self, name: str, patience_s: float = _PATIENCE_S) -> str:
        """What is wrong with another node's file as this node sees it; empty if nothing is."""
        deadline = time.monotonic() + patience_s
        path = self.folder / name
        while True:
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                problem = f"{path}: {error.strerror}"
            else:
                if text == f"{self._word} {name}\n":
                    return ""
                problem = f"{path} holds {text[:60]!r}, another node wrote {self._word!r}"
            if time.monotonic() > deadline:
                return problem
            time.sleep(0.2)
            os.scandir(path.parent).close() if path.parent.is_dir() else None  # a fresh look at a cached folder

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def unshared(run_dir: Path, problem: str, node: str) -> Check:
    """A node that does not see what another one wrote."""
    return Check(
        "shared folder",
        "failed",
        problem,
        needed=f"{run_dir} on a file system that all nodes share, writable",
        help="choose a shared folder (--runs-dir); if only this node fails, its mount is broken",
        node=node,
        blames_node=True,
    )


def _holds(mount: str, path: str) -> bool:
    return path == mount or path.startswith(mount.rstrip("/") + "/")


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"
