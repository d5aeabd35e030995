"""Folders in shared memory that never outlive their owner for long: each is named after the process that it belongs to."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import psutil

from lrscale.keeper import SHARED_MEMORY

_NAME = re.compile(r"lrscale-(\d+)-(\d+)-\w+")


def new_shared_folder() -> Path:
    """An empty folder of this process's own, readable by its user alone; what dead processes left is removed first."""
    root = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    remove_orphans(root)
    return Path(tempfile.mkdtemp(prefix=f"lrscale-{os.getpid()}-{_started(os.getpid())}-", dir=root))


def remove_orphans(root: Path = SHARED_MEMORY) -> list[Path]:
    """Remove the folders whose owner is gone; those."""
    gone = []
    for path in root.glob("lrscale-*"):
        named = _NAME.fullmatch(path.name)
        if named and _orphaned(path, named):
            shutil.rmtree(path, ignore_errors=True)
            gone.append(path)
    return gone


def _orphaned(path: Path, named: re.Match[str]) -> bool:
    try:
        own = path.stat().st_uid == os.getuid()
    except OSError:
        return False
    return own and _started(int(named[1])) != int(named[2])


def _started(pid: int) -> int | None:
    """When a process began, in hundredths of a second; None where there is none."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(100 * process.create_time())
    except psutil.Error:
        return None
