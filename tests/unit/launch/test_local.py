"""Child processes: exit codes for scripts, and signals that arrive once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrscale.launch.local import exit_code

CHILD = """
import pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
def note(number, frame):
    log.write_text(log.read_text() + f"{number} ")
    if sys.argv[2] == "yields":
        sys.exit(130)
signal.signal(signal.SIGINT, note); signal.signal(signal.SIGTERM, note)
log.write_text("ready ")
while True: time.sleep(0.02)
"""
PARENT = """
import sys
from lrscale.launch.local import run_module
sys.exit(run_module("a_child", sys.argv[1:], say=lambda text: print(text, file=sys.stderr)))
"""


@pytest.mark.parametrize(
    ("returned", "code"),
    [(0, 0), (3, 3), (75, 75), (130, 130), (-2, 130), (-15, 143), (143, 143), (1, 6), (-9, 6), (-11, 6), (99, 6)],
)
def test_exit_codes_are_those_of_the_manual(returned: int, code: int) -> None:
    """Locks out a traceback's 1 and a kill's -9 reaching a script that knows 6."""
    assert exit_code(returned) == code


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "nothing"
        time.sleep(0.02)


def start(tmp_path: Path, manner: str) -> tuple[subprocess.Popen[bytes], Path]:
    (tmp_path / "a_child.py").write_text(CHILD)
    log = tmp_path / "log"
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    command = [sys.executable, "-c", PARENT, str(log), manner]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(log, "ready")
    return process, log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_reaches_the_child_once(tmp_path: Path, number: signal.Signals) -> None:
    """Locks out the terminal's Ctrl-C arriving twice (process group and forwarding): the second would kill."""
    process, log = start(tmp_path, "yields")
    os.killpg(process.pid, number)  # as a terminal does: to the whole foreground group
    assert process.wait(timeout=20) == 130
    assert log.read_text() == f"ready {int(number)} "


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    """Locks out a child that never ends because it ignores the first one, and a kill that passes for a failed run."""
    process, log = start(tmp_path, "stays")
    process.send_signal(signal.SIGINT)
    wait_for(log, "ready 2 ")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


@pytest.mark.parametrize("stage", ["worker", "evaluate", "generate"])
def test_a_ctrl_c_while_torch_is_loaded_is_quiet(tmp_path: Path, stage: str) -> None:
    """Locks out a traceback through somebody's imports. A torch that never finishes loading stands in for a slow one."""
    ready = tmp_path / "ready"
    (tmp_path / "torch.py").write_text(f"import time\nopen({str(ready)!r}, 'w').write('ready')\ntime.sleep(60)\n")
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    command = [sys.executable, "-m", "lrscale.stages", stage, "x"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(ready, "ready")
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, b"") and len(said.splitlines()) <= 1, said
