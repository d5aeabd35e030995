"""The smoke recipe on a real GPU: the same code as on the CPU, in bfloat16."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "launchers" / "smoke-1gpu.yaml"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
@pytest.mark.parametrize("kind", ["single", "zero3", "fsdp2"])
def test_the_smoke_recipe_runs_to_its_end_on_one_gpu(kind, tmp_path):
    command = [sys.executable, "-m", "lrscale", "launch", str(RECIPE), "--runs-dir", str(tmp_path)]
    command += ["--set", f"parallel.kind={kind}"]
    command += ["--set", "parallel.offload_between_phases=true"] if kind == "zero3" else []
    finished = subprocess.run(command, timeout=1200, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    run_dir = Path(finished.stdout.strip().splitlines()[-1])
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if line["stage"] == "rl"]
    assert steps and all(line["logprob_gap_mean"] < 0.1 for line in steps), "replay drifts from the rollout"
    assert any(line["latent_steps_mean"] > 0 for line in steps), "no latent step was taken"
    assert (run_dir / "report.html").is_file()
