"""A run that is asked to save and end does so at the next step boundary, in every stage, and loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

from lrscale.report.metrics import read_metrics, without_times
from tests.e2e.conftest import RECIPE, Workers, new_run

SFT_STEPS = RECIPE["stages"]["projector_sft"]["max_steps"]
RL_STEPS = RECIPE["stages"]["rl"]["steps"]


def _metrics(run_dir: Path) -> list[dict]:
    return [without_times(line) for line in read_metrics(run_dir / "metrics.jsonl")]


def test_a_run_that_is_drained_at_every_step_ends_as_one_that_never_was(
    workers: Workers, finished_run: Path, tmp_path: Path
) -> None:
    """Locks out a stage that does not look, one that saves less than it did, and an attempt that makes no step.

    Each attempt finds the request in its folder before it begins, as a batch script's folder may hold it.
    """
    run_dir = new_run(tmp_path / "drained")
    expected = [("traces", 1), ("traces", 2), *(("projector_sft", step + 1) for step in range(SFT_STEPS))]
    expected += [*(("latent", step + 1) for step in range(RL_STEPS)), ("latent", RL_STEPS)]  # and its evaluation
    expected += [("discrete", step + 1) for step in range(RL_STEPS)]
    marks: list[tuple[str, int]] = []
    while not (run_dir / "done.json").exists():
        folder = run_dir / "attempts" / str(len(marks) + 1)
        folder.mkdir(parents=True)
        (folder / "drain").touch()
        code = workers.run(run_dir, "--attempt", folder.name)
        if code == 0:
            break
        assert code == 130, (folder / "rank0.log").read_text()
        mark = json.loads((folder / "checkpointed").read_text())
        assert json.loads((folder / "exit.json").read_text())["reason"].startswith("drained: ")
        marks.append((mark["stage"], mark["step"]))
        assert len(marks) <= len(expected), marks
    assert marks == expected
    assert _metrics(run_dir) == _metrics(finished_run)
    for arm in RECIPE["stages"]["rl"]["arms"]:
        weights = [(folder / "models" / arm / "model.safetensors").read_bytes() for folder in (run_dir, finished_run)]
        assert weights[0] == weights[1]
