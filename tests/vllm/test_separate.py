"""A trainer and the engines of another role, as a job with `rollout.placement: separate` runs them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.vllm.runs import assert_complete, launched, rl_steps, started, until
from tests.vllm.shared_memory import in_shared_memory, left_in_shared_memory

pytestmark = pytest.mark.slow

STEPS = 3
SETTINGS = (
    "rollout.placement=separate",
    "rollout.transport=broadcast",
    f"stages.rl.steps={STEPS}",
)


def test_engines_of_another_role_serve_a_run_over_their_own_death(tmp_path: Path):
    """Locks out a trainer that does not find its role's engines or an engine's successor, and a role that outlives
    its end.
    """
    shared, run, log = in_shared_memory(), tmp_path / "runs" / "two-roles", tmp_path / "trainer"
    trainer, role = launched(log, "two-roles", SETTINGS), None
    try:
        until((run / "recipe.json").is_file, trainer, log)
        role = started(tmp_path / "role", "serve-rollouts", str(run), "--host", "127.0.0.1")
        until(lambda: len(rl_steps(run)) >= 1, trainer, log)
        below = psutil.Process(role.pid).children(recursive=True)
        next(p for p in below if "EngineCore" in " ".join(p.cmdline())).kill()
        assert trainer.wait(300) == 0, log.read_text()[-3000:]
        below = psutil.Process(role.pid).children(recursive=True)
        role.terminate()
        role.wait(60)
    finally:
        for process in (trainer, role):
            if process is not None:
                process.kill()
                process.wait()
    assert "starts anew" in (tmp_path / "role").read_text()
    assert [line["step"] for line in rl_steps(run)] == [1, 2, 3]
    for line in rl_steps(run):
        assert_complete(run, line)
    assert not psutil.wait_procs(below, timeout=30)[1]
    assert not left_in_shared_memory(shared)
