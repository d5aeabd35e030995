"""A sharded job whose ranks, or launcher, are killed at any moment: bit for bit the metrics of one nobody touched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT

pytestmark = pytest.mark.slow

KILLS = 20


def test_any_process_killed_at_any_moment(tmp_path: Path):
    """In every stage, and with a checkpoint half written; whatever was lost comes again, and is the same."""
    options = [
        "--set",
        "parallel.kind=zero3",
        "--set",
        "parallel.ranks_per_node=2",
        "--kills",
        str(KILLS),
        "--seed",
        "7",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "lrscale", "verify-resume", *options, "--keep", str(tmp_path / "runs")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = re.search(r"equal bit for bit after (\d+) kills \((\d+) inside a checkpoint\)", done.stderr)
    assert told, done.stderr
    assert int(told[1]) > KILLS // 2 and int(told[2]) > 0, "the job must really have been killed, and in a checkpoint"
    attempts = list((tmp_path / "runs/killed/attempts").glob("[0-9]*"))
    assert len(attempts) > KILLS // 2
