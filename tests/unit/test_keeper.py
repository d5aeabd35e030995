"""Kept processes: whoever ends, and however, nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lrscale.rollout.shared_memory import new_shared_folder, remove_orphans

ROOT = Path(__file__).resolve().parent.parent.parent
KEPT = """
import mmap, os, subprocess, sys, time
from lrscale.keeper import keep
from lrscale.rollout.shared_memory import remove_orphans

def work():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    with open("/dev/shm/lrscale-test-" + sys.argv[1], "w+b") as file:
        file.write(b"x" * 4096); file.flush()
        held = mmap.mmap(file.fileno(), 4096)
    time.sleep(1.5)  # the keeper looks once a second for what is shared
    open(sys.argv[1] + ".pids", "w").write(f"{os.getpid()} {child.pid}")
    os.rename(sys.argv[1] + ".pids", sys.argv[1] + ".ready")
    time.sleep(600)
    return 0

os.chdir(sys.argv[2])
sys.exit(keep(work, lifeline=0, when_orphaned=lambda: [time.sleep(0.2), remove_orphans()]))
"""
OWNER = """
import subprocess, sys, time
from lrscale.rollout.shared_memory import new_shared_folder
folder = new_shared_folder()
(folder / "bucket").write_bytes(b"x")
open(sys.argv[2] + "/folder", "w").write(str(folder))
subprocess.Popen([sys.executable, "-c", sys.argv[3], *sys.argv[1:3]], stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("victim", ["owner", "worker"])
def test_a_kill_leaves_no_process_and_no_shared_memory(victim: str, tmp_path: Path):
    """Locks out engines that hold a GPU, and gigabytes of shared memory, after SIGKILL of a trainer or an engine."""
    name = f"{os.getpid()}-{victim}"
    shared = Path("/dev/shm") / f"lrscale-test-{name}"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, name, str(tmp_path), KEPT], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        ready = tmp_path / f"{name}.ready"
        until(ready.is_file)
        worker, child = map(int, ready.read_text().split())
        folder = Path((tmp_path / "folder").read_text())
        assert shared.is_file() and (folder / "bucket").is_file()
        if victim == "owner":
            owner.kill()
            owner.wait()
        else:
            os.kill(worker, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(worker) and not psutil.pid_exists(child) and not shared.exists())
        if victim == "owner":
            until(lambda: not folder.exists())
        else:
            assert folder.is_dir()  # the owner lives and goes on with other engines
    finally:
        owner.kill()
        owner.wait()
        shared.unlink(missing_ok=True)
    remove_orphans()
    assert not folder.exists()


def test_folders_of_living_owners_stay():
    """Locks out a second run on a node that removes the first one's weights from under it."""
    folder = new_shared_folder()
    try:
        assert folder not in remove_orphans() and folder.is_dir()
        other = new_shared_folder()
        other.rmdir()
        assert folder.is_dir()
    finally:
        folder.rmdir()
