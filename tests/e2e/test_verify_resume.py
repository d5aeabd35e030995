"""`lrscale verify-resume` must find a run that does not resume exactly, or its yes is worth nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
REWARD = """
import os
def reward(prompts, completions, **columns):
    return [float(len(text) % 3 + {extra}) for text in completions]
"""


def verify(folder: Path, extra: str) -> subprocess.CompletedProcess[str]:
    (folder / "reward.py").write_text(REWARD.replace("{extra}", extra))
    (folder / "mine.yaml").write_text("reward: {kind: function, path: reward.py}\n")
    command = [sys.executable, "-m", "lrscale", "verify-resume", "tiny-short", "mine.yaml", "--kills", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, "--keep", "runs"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_reward_that_depends_on_the_process_is_found_out(tmp_path: Path):
    done = verify(tmp_path, "os.getpid()")
    assert done.returncode == 6, done.stderr
    assert "the killed run is not the one left alone: metrics line" in done.stderr
    again = verify(tmp_path, "0")
    assert again.returncode == 2 and "already holds runs" in again.stderr


def test_control_the_same_run_with_an_honest_reward_is_equal(tmp_path: Path):
    done = verify(tmp_path, "0")
    assert done.returncode == 0 and "equal bit for bit after 2 kills" in done.stderr, done.stderr
