"""Each rank scores what it sampled; one whose reward hangs is waited for, and not taken for a stall."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import launch

pytestmark = pytest.mark.slow


def test_a_reward_that_hangs_on_one_rank_is_waited_for_and_no_rank_is_missing(tmp_path: Path) -> None:
    """The others used to sit in a collective until the watchdog, or NCCL two hours later, ended the job."""
    (tmp_path / "reward.py").write_text(
        "import os, time\n"
        "def reward(prompts, completions):\n"
        "    with open(__file__ + os.environ['RANK'], 'a') as file: print(prompts[0], file=file)\n"
        "    if prompts[0] == 'ddd': time.sleep(1000)\n"
        "    return [float('abcd'.index(prompts[0][0]))]\n"
    )
    outcome = launch("rewards", str(tmp_path), timeout_s=240)
    assert outcome.code == 0, outcome.stderr[-3000:]
    first, second = outcome.by_rank()
    assert "stalled" not in first and first["scores"] == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, "timeout", "timeout"]
    assert second["scores"] == first["scores"] and second["metrics"] == first["metrics"]
    assert first["metrics"]["samples"] == 8 and first["metrics"]["failed_timeout"] == 2
    assert first["metrics"]["waited_s"] > 10, "the wait of the rank that waited longest"
    asked = [(tmp_path / f"reward.py{rank}").read_text().split() for rank in (0, 1)]
    assert [sorted(names) for names in asked] == [["aaa", "aaa", "bbb", "bbb"], ["ccc", "ccc", "ddd", "ddd"]]
