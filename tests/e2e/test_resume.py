"""A run that was interrupted goes on to bit for bit the metrics of a run that was not."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

from lrscale.report.metrics import read_metrics, without_times
from tests.e2e.conftest import Workers, new_run


def _metrics(run_dir: Path) -> list[dict]:
    return [without_times(line) for line in read_metrics(run_dir / "metrics.jsonl")]


def _lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _model(run_dir: Path, arm: str) -> bytes:
    return (run_dir / "models" / arm / "model.safetensors").read_bytes()


def test_interrupted_at_many_moments(workers: Workers, finished_run: Path, tmp_path: Path):
    """In traces, in SFT, in each arm, inside a checkpoint: every resume has lost state somewhere, some time."""
    run_dir = new_run(tmp_path / "interrupted")
    expected = _metrics(finished_run)
    checkpoints = run_dir / "checkpoints"

    def lines(count: int) -> Callable[[], bool]:
        return lambda: _lines(run_dir) >= count

    moments = [
        (signal.SIGKILL, lambda: (run_dir / "traces" / "part-00000.jsonl").exists()),
        (signal.SIGKILL, lines(13)),  # in projector SFT
        (signal.SIGKILL, lambda: any(checkpoints.glob("projector_sft/.tmp-*"))),  # a checkpoint half written
        (signal.SIGINT, lambda: any(checkpoints.glob("projector_sft/step-4"))),  # before the stage is marked as done
        (signal.SIGKILL, lines(19)),  # in the first arm, no checkpoint yet
        (signal.SIGTERM, lines(23)),  # in the first arm, behind its refresh
        (signal.SIGKILL, lines(len(expected) - 6)),
        (signal.SIGINT, lines(len(expected) - 2)),
    ]
    for attempt, (number, moment) in enumerate(moments, start=1):
        code = workers.stop_when(run_dir, moment, number)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert not (run_dir / "done.json").exists()
        end = run_dir / "attempts" / str(attempt) / "exit.json"
        assert end.exists() == (code == 130)
        assert not end.exists() or json.loads(end.read_text())["reason"] == "interrupted"
    assert workers.run(run_dir) == 0
    assert _metrics(run_dir) == expected
    for arm in ("latent", "discrete"):
        assert _model(run_dir, arm) == _model(finished_run, arm), "weights must be equal too, not only what was logged"
    assert (run_dir / "attempts" / "latest").resolve().name == str(len(moments) + 1)


def test_a_finished_run_is_left_alone(workers: Workers, finished_run: Path):
    before = (finished_run / "metrics.jsonl").read_bytes()
    assert workers.run(finished_run) == 0
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_two_launches_into_one_run_directory(workers: Workers, tmp_path: Path):
    """Two writers would interleave their lines and checkpoints."""
    run_dir = new_run(tmp_path / "twice")
    first = workers.start(run_dir)
    while _lines(run_dir) < 1:
        first.join(0.01)
    assert workers.run(run_dir) == 75
    first.kill()
    first.join()
    assert [path.name for path in (run_dir / "attempts").iterdir() if path.name.isdigit()] == ["1"]
