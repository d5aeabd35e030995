"""Exit codes, messages and the attempt's record of a job that cannot go on."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lrscale.config.recipe import Recipe
from lrscale.parallel.checkpoint import CheckpointError, DamagedCheckpointWarning
from lrscale.parallel.engine import NonFiniteError
from lrscale.report.metrics import MetricsDamaged
from lrscale.reward.budget import RewardBudgetError
from lrscale.stages import worker
from lrscale.stages.rollout_io import StateDamagedError

SMALL: dict[str, Any] = {
    "projector": {"kind": "normalised"},
    "rollout": {"max_new_tokens": 8},
    "parallel": {"threads": 1},
    "stages": {"traces": {"prompts": 2, "samples_per_prompt": 1}, "rl": {"arms": ["discrete"], "prompts_per_step": 4}},
}


def _run(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = Recipe.model_validate({**SMALL, **changes})
    (folder / "recipe.json").write_text(recipe.model_dump_json(), encoding="utf-8")
    return folder


def _own_task(folder: Path, reward: str, prompt: str = "Go on.") -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    rows = "".join(json.dumps({"prompt": f"{prompt} {number}"}) + "\n" for number in range(4))
    for split in ("train", "eval"):
        (folder / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    (folder / "reward.py").write_text(reward, encoding="utf-8")
    task = {"kind": "jsonl", "train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")}
    return {"task": task, "reward": {"kind": "function", "path": str(folder / "reward.py")}}


def _ended(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "attempts" / "latest" / "exit.json").read_text(encoding="utf-8"))


def test_no_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert worker.main([str(tmp_path)]) == 7
    assert "recipe.json" in capsys.readouterr().err


def test_a_held_lock_is_no_failure_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = _run(tmp_path / "run")
    with worker.locked(run_dir / "lock"):
        assert worker.main([str(run_dir)]) == 75
    assert '"pid"' in capsys.readouterr().err
    assert not (run_dir / "attempts").exists()
    with worker.locked(run_dir / "lock"):
        pass


def test_what_the_user_can_mend_is_told_in_a_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The traceback belongs into the attempt's log, not over the message."""
    run_dir = _run(tmp_path / "run", model={"path": str(tmp_path / "missing")})
    assert worker.main([str(run_dir)]) == 3
    shown = capsys.readouterr().err
    assert "missing" in shown and "Traceback" not in shown
    assert "Traceback" in (run_dir / "attempts" / "1" / "rank0.log").read_text(encoding="utf-8")
    assert _ended(run_dir)["code"] == 3


def test_a_reward_function_that_raises_stops_the_run_with_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It must not pass for a reward of 0."""
    own = _own_task(tmp_path / "own", "def reward(prompts, completions, **columns):\n    raise KeyError('level')\n")
    run_dir = _run(tmp_path / "run", **own)
    assert worker.main([str(run_dir)]) == 6
    shown = capsys.readouterr().err
    assert "scores failed" in shown and "KeyError: 'level'" in shown and "reward.py" in shown
    assert _ended(run_dir)["reason"].startswith("RewardBudgetError")


def test_traces_without_a_right_answer_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An empty training set would show as a division by zero much later."""
    own = _own_task(
        tmp_path / "own", "def reward(prompts, completions, **columns):\n    return [0.0 for _ in prompts]\n"
    )
    assert worker.main([str(_run(tmp_path / "run", **own))]) == 3
    assert "no trace earned a positive reward" in capsys.readouterr().err


def test_a_bug_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def broken(recipe: Recipe, run_dir: Path, lockstep: object) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(worker, "build_parts", broken)
    assert worker.main([str(_run(tmp_path / "run"))]) == 6
    assert "a bug in lrscale" in capsys.readouterr().err


def test_attempts_are_counted_and_latest_points_to_the_newest(tmp_path: Path):
    for number in (1, 2, 3):
        assert worker.new_attempt(tmp_path / "attempts").name == str(number)
    assert (tmp_path / "attempts" / "latest").resolve() == (tmp_path / "attempts" / "3").resolve()


@pytest.mark.parametrize(
    ("error", "code", "advice"),
    [
        (OSError(28, "No space left on device"), 6, "goes on from its last checkpoint"),
        (CheckpointError("disk full"), 6, "goes on from its last checkpoint"),
        (NonFiniteError("loss is nan"), 6, "meets the same error"),
        (RewardBudgetError("scores failed"), 6, "meets the same error"),
        (ValueError("no such key"), 3, "meets the same error"),
        (StateDamagedError("lost lines"), 6, "file is restored"),
        (MetricsDamaged("line 3"), 6, "file is restored"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 6, "rollout.batch_rows"),
    ],
)
def test_the_advice_fits_the_error(
    error: Exception, code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Resuming is exact: to launch again after a NaN meets the same NaN. A lost file is no bad recipe."""

    def failing(recipe: Recipe, run_dir: Path, lockstep: object) -> None:
        raise error

    monkeypatch.setattr(worker, "build_parts", failing)
    assert worker.main([str(_run(tmp_path / "run"))]) == code
    shown = capsys.readouterr().err
    assert advice in shown and str(error).split(". ")[0] in shown
    assert "a bug in lrscale" not in shown
    assert ("goes on from its last checkpoint" in shown) == (advice == "goes on from its last checkpoint")


def test_a_damaged_mark_is_no_bad_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = _own_task(
        tmp_path / "own", "def reward(prompts, completions, **columns):\n    return [1.0 for _ in prompts]\n"
    )
    run_dir = _run(tmp_path / "run", **own)
    mark = run_dir / "checkpoints" / "traces" / "done.json"
    mark.parent.mkdir(parents=True)
    for content in ("{", "[]"):
        mark.write_text(content, encoding="utf-8")
        assert worker.main([str(run_dir)]) == 6
        shown = capsys.readouterr().err
        assert str(mark) in shown and "Traceback" not in shown


def test_prompts_that_do_not_fit_are_found_before_the_first_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Else the held-out prompts stop the run after traces and projector SFT, hours later."""
    own = _own_task(
        tmp_path / "own", "def reward(prompts, completions, **columns):\n    return [1.0 for _ in prompts]\n"
    )
    with (tmp_path / "own" / "eval.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "walk on " * 200}) + "\n")
    run_dir = _run(tmp_path / "run", **own)
    assert worker.main([str(run_dir)]) == 3
    shown = capsys.readouterr().err
    assert "held-out prompt" in shown and "rollout.max_new_tokens is 8" in shown
    assert not (run_dir / "traces").exists() and not (run_dir / "metrics.jsonl").read_bytes()


def test_a_full_disk_hides_no_error_and_shows_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The text of the lock, the log and exit.json cannot be written; what stopped the run is told all the same."""

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    run_dir = _run(tmp_path / "run", model={"path": str(tmp_path / "missing")})
    (run_dir / "lock").symlink_to("/dev/full")
    monkeypatch.setattr(worker, "write_json", full)
    new_attempt = worker.new_attempt

    def without_room(folder: Path) -> Path:
        made = new_attempt(folder)
        (made / "rank0.log").symlink_to("/dev/full")
        return made

    monkeypatch.setattr(worker, "new_attempt", without_room)
    assert worker.main([str(run_dir)]) == 3
    shown = capsys.readouterr().err
    assert "missing" in shown.split("error: ")[1]
    assert "Traceback" not in shown and "Logging error" not in shown and shown.count("rank0.log cannot be written") == 1


def test_no_room_for_an_attempt_is_told_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(folder: Path) -> Path:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(worker, "new_attempt", full)
    assert worker.main([str(_run(tmp_path / "run"))]) == 6
    shown = capsys.readouterr().err
    assert "No space left" in shown and "make room" in shown and "MiB" in shown


def test_a_damaged_recipe_is_shown_as_a_recipe_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Locks out pydantic's own text with its links."""
    run_dir = _run(tmp_path / "run")
    (run_dir / "recipe.json").write_text('{"sed": 3}', encoding="utf-8")
    assert worker.main([str(run_dir)]) == 3
    shown = capsys.readouterr().err
    assert shown.startswith("error: unknown key sed") and "recipe.json:1" in shown and "pydantic" not in shown


def test_a_skipped_checkpoint_is_told_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Hours of work are done again: the log alone is not enough. Warnings of libraries stay in the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with worker.logged_to(tmp_path / "log"):
            warnings.warn("checkpoint b is damaged", DamagedCheckpointWarning, stacklevel=1)
            warnings.warn("of a library", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: checkpoint b is damaged\n"
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "checkpoint b is damaged" in log and "of a library" in log


def test_one_process_does_without_deepspeed():
    """Locks out seconds of import, and a worker that does not start where DeepSpeed is not to be had."""
    code = "import sys, lrscale.stages.worker; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
