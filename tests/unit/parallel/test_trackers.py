"""TensorBoard really written and read back; wandb offline where it is installed."""

import importlib.util

import pytest

from lrscale.config.recipe import Recipe
from lrscale.parallel.trackers import open_trackers, run_id

METRICS = {"stage": "rl", "arm": "latent", "step": 3, "reward_mean": 0.5, "note": "text", "histogram": {"0": 1}}


def test_tensorboard_events(tmp_path):
    """Locks out scalars of two stages that overwrite each other under one tag, and a secret in the hyperparameters."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Recipe().model_dump() | {"hf_token": "hf_verysecret", "nested": {"api-key": "hf_verysecret"}}
    trackers = open_trackers(("tensorboard",), "demo", tmp_path / "run-1", config)
    trackers.log(METRICS, step=3)
    trackers.log({"stage": "projector_sft", "arm": None, "step": 1, "loss": 2.0}, step=1)
    trackers.log({"stage": "rl"}, step=4)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "run-1/tensorboard/demo")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["projector_sft/loss", "rl/latent/reward_mean"]
    scalar = events.Scalars("rl/latent/reward_mean")[0]
    assert (scalar.step, scalar.value) == (3, 0.5)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hf_verysecret" not in written and b"stages.rl.clip_low" in written


def test_no_trackers(tmp_path):
    trackers = open_trackers((), "demo", tmp_path, {})
    trackers.log(METRICS, step=3)
    trackers.close()
    assert list(tmp_path.iterdir()) == []


def test_missing_package_and_unknown_name(tmp_path, monkeypatch):
    """Locks out an ImportError in mid-run, after the traces."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb, which is not installed: pip install wandb"):
        open_trackers(("wandb",), "demo", tmp_path, {})
    with pytest.raises(ValueError, match="allowed are tensorboard, wandb"):
        open_trackers(("mlflow",), "demo", tmp_path, {})


def test_wandb_offline(tmp_path, monkeypatch):
    """Locks out steps that wandb drops because they start again with each stage."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = open_trackers(("wandb",), "demo", tmp_path, {"seed": 1})
    trackers.log({**METRICS, "step": 30}, step=30)
    trackers.log({"stage": "projector_sft", "step": 1, "loss": 2.0}, step=1)
    trackers.close()
    assert any(path.suffix == ".wandb" for path in tmp_path.rglob("*"))


def test_runs_of_one_name_do_not_share_a_wandb_id(tmp_path):
    """Two runs called demo, in two folders, would be drawn into one."""
    first, other = run_id(tmp_path / "a" / "demo"), run_id(tmp_path / "b" / "demo")
    assert first != other and first == run_id(tmp_path / "b" / ".." / "a" / "demo")
