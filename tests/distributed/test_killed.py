"""A job whose ranks are killed at any moment goes on to bit for bit the metrics of one that nobody touched."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lrscale.report.metrics import read_metrics, without_times
from tests.distributed.ranks import ROOT
from tests.e2e.conftest import RECIPE

pytestmark = pytest.mark.slow

KILLS = 20
LIMIT_S = 120


def _recipe() -> dict[str, Any]:
    stages = {**RECIPE["stages"], "rl": {**RECIPE["stages"]["rl"], "arms": ["latent"], "checkpoint_every": 1}}
    stages["rl"] |= {"kl": {"coefficient": 0.0}, "steps": 6}
    parallel = {"kind": "zero3", "ranks_per_node": 2, "threads": 1}
    return {**RECIPE, "name": "killed", "stages": stages, "parallel": parallel}


def _start(folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(_recipe()), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "lrscale", "launch", "recipe.yaml"],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=(folder / "stderr").open("ab"),
    )  # fmt: skip


def _ranks(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        lines = {child: child.cmdline() for child in children}
        return [child for child, line in lines.items() if "worker" in line and "lrscale.parallel.agent" not in line]
    except psutil.NoSuchProcess:
        return []


def _lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_any_rank_killed_at_any_moment(tmp_path: Path):
    """In every stage, and with a checkpoint half written; whatever was lost comes again, and is the same."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert _start(undisturbed).wait(timeout=LIMIT_S) == 0, (undisturbed / "stderr").read_text()[-3000:]
    expected = [without_times(line) for line in read_metrics(undisturbed / "runs/killed/metrics.jsonl")]
    run_dir, dice = killed / "runs/killed", random.Random(7)
    moments = sorted(dice.uniform(0, len(expected)) for _ in range(KILLS))
    for number, moment in enumerate(moments):
        process = _start(killed)
        inside_checkpoint = number % 4 == 3
        delay_s = dice.uniform(0, 0.5)
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < LIMIT_S:
            half_written = any(run_dir.glob("checkpoints/*/.tmp-*"))
            if (half_written if inside_checkpoint else _lines(run_dir) >= moment) and len(_ranks(process)) == 2:
                break
            time.sleep(0.005)
        if not inside_checkpoint:
            time.sleep(delay_s)
        if victims := _ranks(process):
            dice.choice(victims).send_signal(signal.SIGKILL)
        code = process.wait(timeout=LIMIT_S)
        if code == 0:
            break  # the last moments can come after the end
    assert (run_dir / "done.json").exists() or _start(killed).wait(timeout=LIMIT_S) == 0
    assert [without_times(line) for line in read_metrics(run_dir / "metrics.jsonl")] == expected
    model = "models/latent/model.safetensors"
    assert (run_dir / model).read_bytes() == (undisturbed / "runs/killed" / model).read_bytes()
    assert len(list((run_dir / "attempts").glob("[0-9]*"))) > KILLS // 2, "the job must really have been killed"
