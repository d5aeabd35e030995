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
MINE = """
reward: {kind: function, path: reward.py}
stages:
  traces: {prompts: 8, samples_per_prompt: 1}
  projector_sft: {max_steps: 2}
  rl: {steps: 4, prompts_per_step: 2, group_size: 2}
  evaluate: {prompts: 2}
"""


def verify(folder: Path, extra: str, kills: int) -> subprocess.CompletedProcess[str]:
    (folder / "reward.py").write_text(REWARD.replace("{extra}", extra))
    (folder / "mine.yaml").write_text(MINE)
    command = [sys.executable, "-m", "lrscale", "verify-resume", "tiny-short", "mine.yaml", "--kills", str(kills)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, "--keep", "runs"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_reward_that_depends_on_the_process_is_found_out(tmp_path: Path):
    done = verify(tmp_path, "os.getpid()", kills=3)  # the only one might come when all is over
    assert done.returncode == 6, done.stderr
    assert "the killed run is not the one left alone: metrics line" in done.stderr
    again = verify(tmp_path, "0", kills=1)
    assert again.returncode == 2 and "already holds runs" in again.stderr


def test_control_the_same_run_with_an_honest_reward_is_equal(tmp_path: Path):
    done = verify(tmp_path, "0", kills=2)
    assert done.returncode == 0 and "equal bit for bit after 2 kills" in done.stderr, done.stderr
