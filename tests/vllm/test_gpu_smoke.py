"""The check that users run on a GPU: that it says so where there is none, and where there is one, that it passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def smoke() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.vllm_gpu_smoke"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    """Locks out a check that passes because it did not run."""
    done = smoke()
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "error: no NVIDIA GPU is visible to torch; this check needs one\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
def test_on_a_gpu_it_passes() -> None:
    done = smoke()
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
