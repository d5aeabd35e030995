"""Starts a program of tests/distributed/programs on several gloo processes, as users' jobs are started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.launch.job import free_port

PROGRAMS = Path(__file__).parent / "programs"
ROOT = PROGRAMS.parent.parent.parent


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    code: int | None
    """None where it ran past its time and was killed."""
    results: list[dict[str, Any]]
    """What the ranks reported, in the order of lines."""
    stderr: str

    def by_rank(self) -> list[dict[str, Any]]:
        return sorted(self.results, key=lambda result: result["rank"])


def launch(program: str, *arguments: str, ranks: int = 2, timeout_s: float = 300) -> Outcome:
    """`accelerate launch` on this machine's CPU; every rank prints one line of JSON that starts with {"rank"."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(ranks), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), "-m", f"tests.distributed.programs.{program}", *arguments]
    if ranks == 1:  # accelerate starts one process without a process group of its own
        command = [sys.executable, "-m", f"tests.distributed.programs.{program}", *arguments]
    own = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment |= own if ranks == 1 else {}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        code = None
    lines = [line for line in stdout.splitlines() if line.startswith('{"rank"')]
    return Outcome(code, [json.loads(line) for line in lines], stderr)
