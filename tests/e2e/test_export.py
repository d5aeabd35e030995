"""`lrscale export`: what a run has learned, out of its checkpoints, for others to load."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrscale.config.model import ModelConfig, ProjectorConfig
from lrscale.latent.projector_folder import ProjectorFolder
from lrscale.parallel.loading import load_policy
from tests.e2e.conftest import Workers, new_run

ROOT = Path(__file__).parents[2]


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lrscale", "export", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_becomes_the_model_that_the_arm_left(finished_run: Path, tmp_path: Path):
    """Locks out a wrong dtype, a missing tensor, and files that plain transformers cannot read."""
    done = export(finished_run, tmp_path / "out", "--arm", "latent", "--max-shard-gb", 0.001)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert_equal(tensors_of(tmp_path / "out"), tensors_of(finished_run / "models" / "latent"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(plain.lm_head.weight, tensors_of(tmp_path / "out")["lm_head.weight"])
    assert load_policy(ModelConfig(path=str(tmp_path / "out")), ProjectorConfig(kind="normalised")).max_latent_steps

    again = export(finished_run, tmp_path / "out")
    assert again.returncode == 2 and "exists already" in again.stderr


def test_a_run_that_is_not_finished(workers: Workers, tmp_path: Path):
    """The newest checkpoint counts; what was never reached is named."""
    run_dir = new_run(tmp_path / "run")
    empty = export(run_dir, tmp_path / "out")
    assert empty.returncode == 3 and "nothing to export" in empty.stderr
    workers.stop_when(run_dir, lambda: any(run_dir.glob("checkpoints/projector_sft/step-2")), signal.SIGKILL)
    missing = export(run_dir, tmp_path / "out", "--arm", "latent")
    assert missing.returncode == 3 and "no latent to export" in missing.stderr and "projector_sft" in missing.stderr
    done = export(run_dir, tmp_path / "out")
    assert done.returncode == 0 and "exporting projector_sft" in done.stderr, done.stderr


def test_a_projector_starts_another_run(finished_run: Path, tmp_path: Path):
    """Locks out an artifact that nothing reads, and one that is read into the wrong place."""
    done = export(finished_run, tmp_path / "projector", "--projector-only")
    assert done.returncode == 0, done.stderr
    config = ProjectorConfig(kind="normalised", path=str(tmp_path / "projector"))
    policy = load_policy(ModelConfig(), config)
    prefix = "reasoning_projector."
    trained = tensors_of(finished_run / "models" / "latent")
    expected = {name: tensor for name, tensor in trained.items() if name.startswith(prefix)}
    assert_equal({prefix + name: tensor for name, tensor in policy.projector.state_dict().items()}, expected)
    assert ProjectorFolder.read(tmp_path / "projector").hidden_size == policy.backbone.hidden_size
    with pytest.raises(ValueError, match=r"projector.kind normalised and projector.layers 3; the recipe says paper"):
        load_policy(ModelConfig(), ProjectorConfig(path=config.path))
