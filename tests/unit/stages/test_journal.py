"""Checkpoints, marks and the size of metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrscale.config.optimisation import OptimisationConfig
from lrscale.parallel.checkpoint import CheckpointError
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.single import SingleEngine
from lrscale.report.metrics import MetricsLog, read_metrics
from lrscale.stages.journal import Journal
from lrscale.stages.rollout_io import StateDamagedError
from tests.unit.latent.tiny_models import live_policy


@pytest.fixture
def engine() -> SingleEngine:
    return SingleEngine(live_policy(dtype=torch.float32), OptimisationConfig(), ranks=Ranks())


def _steps(metrics: MetricsLog, *steps: int) -> None:
    for step in steps:
        metrics.append({"stage": "rl", "step": step})


def _weight(engine: SingleEngine) -> torch.Tensor:
    return next(engine.policy.model.parameters())


def test_going_on_cuts_metrics_back_to_the_checkpoint(tmp_path: Path, engine: SingleEngine):
    """Lines written after the checkpoint would appear twice."""
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        journal = Journal(tmp_path / "checkpoints", engine, metrics)
        _steps(metrics, 1, 2)
        before = _weight(engine).clone()
        journal.save("latent", 2, {"totals": {"train_tokens": 5}})
        _steps(metrics, 3)
        with torch.no_grad():
            _weight(engine).add_(1.0)
        state = Journal(tmp_path / "checkpoints", engine, metrics).resume("latent")
        assert state is not None
        assert state["step"] == 2 and state["totals"] == {"train_tokens": 5}
        assert torch.equal(_weight(engine), before)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_without_a_checkpoint_a_stage_begins_where_the_former_ended(tmp_path: Path, engine: SingleEngine):
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        journal = Journal(tmp_path / "checkpoints", engine, metrics)
        _steps(metrics, 1)
        assert not journal.is_done("traces")
        journal.finish("traces")
        _steps(metrics, 2, 3)
        later = Journal(tmp_path / "checkpoints", engine, metrics)
        assert later.is_done("traces")
        assert later.resume("projector_sft") is None
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_arms_start_from_the_end_of_projector_sft_alone(tmp_path: Path, engine: SingleEngine):
    """An arm that started from a checkpoint in the middle would be no fair comparison."""
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        journal = Journal(tmp_path / "checkpoints", engine, metrics)
        journal.save("projector_sft", 50, {})
        with pytest.raises(CheckpointError, match="gone or damaged"):
            journal.load_end_of("projector_sft")
        journal.save("projector_sft", 60, {"final": True})
        journal.load_end_of("projector_sft")


def test_metrics_that_lost_lines_are_damage_not_a_bad_recipe(tmp_path: Path, engine: SingleEngine):
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        journal = Journal(tmp_path / "checkpoints", engine, metrics)
        _steps(metrics, 1, 2)
        journal.save("latent", 2, {})
        metrics.truncate(0)
        with pytest.raises(StateDamagedError, match="lines were lost"):
            journal.resume("latent")
