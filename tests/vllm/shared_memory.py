"""What is left in shared memory, also while other tests have their own things there."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")


def in_shared_memory() -> set[Path]:
    """lrscale's folders and vLLM's own segments."""
    return {path for path in SHARED_MEMORY.iterdir() if path.name.startswith(("lrscale-", "psm_"))}


def left_in_shared_memory(before: set[Path]) -> set[Path]:
    """What came since `before` and is this process's own or that of nobody alive: other tests run beside this one."""
    return {path for path in in_shared_memory() - before if not _of_others(path)}


def _of_others(path: Path) -> bool:
    if owner := re.match(r"lrscale-(\d+)-", path.name):
        return int(owner[1]) != os.getpid() and _alive(int(owner[1]))
    return any(_maps(process, path) for process in psutil.process_iter())


def _alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _maps(process: psutil.Process, path: Path) -> bool:
    with suppress(OSError):
        return str(path) in Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
    return False
