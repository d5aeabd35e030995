"""Whole runs on two ranks, every arm and stage, beside the same run in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lrscale.report.metrics import of_stage, read_metrics
from tests.distributed.ranks import ROOT

pytestmark = pytest.mark.slow

# Alignment at a small rate: Adam's first steps are little but signs, which rounding flips where gradients are near 0.
ARMS = ["latent", "discrete", "zero_latent"]
RECIPE = f"""
stages:
  traces: {{prompts: 8, samples_per_prompt: 1}}
  projector_sft: {{max_steps: 2, alignment: {{learning_rate: 1e-5}}}}
  evaluate: {{prompts: 2}}
  rl:
    arms: [{", ".join(ARMS)}]
    steps: 2
    prompts_per_step: 2
    group_size: 2
    refresh: {{every_steps: 1, share: 0.5}}
    kl: {{coefficient: 0.01}}
    importance: {{old_logprobs: recomputed, correction_cap: 2.0}}
"""


def run(folder: Path, name: str, *settings: str) -> list[dict[str, Any]]:
    """The metrics of a run of tiny-short with all arms."""
    (folder / "arms.yaml").write_text(RECIPE)
    options = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "lrscale", "launch", "tiny-short", "arms.yaml", "--name", name, *options],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in (folder / "runs" / name / "models").iterdir()} == set(ARMS)
    return read_metrics(folder / "runs" / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("alone"), "alone")


@pytest.mark.parametrize(("kind", "gather"), [("zero3", "per_layer"), ("fsdp2", "whole")])
def test_every_arm_runs_on_two_ranks_as_in_one_process(
    kind: str, gather: str, alone: list[dict[str, Any]], tmp_path: Path
):
    """Locks out samples dealt to ranks twice or not at all, a refresh that ranks leave at different times, KL and
    recomputed log-probs of the wrong rows. Behind the first updates rounding decides tokens, so these are compared.
    """
    settings = [f"parallel.kind={kind}", f"parallel.gather={gather}", "parallel.ranks_per_node=2"]
    found = run(tmp_path, "ranks", *settings)
    keys = [(line["stage"], line.get("arm"), line["step"]) for line in alone]
    assert [(line["stage"], line.get("arm"), line["step"]) for line in found] == keys

    for stage, values in (("traces", ["samples", "kept", "tokens"]), ("projector_sft", ["loss"])):
        for ours, theirs in zip(of_stage(found, stage), of_stage(alone, stage), strict=True):
            assert {key: ours[key] for key in values} == pytest.approx({key: theirs[key] for key in values}, rel=1e-3)
    for ours, theirs in zip(of_stage(found, "projector_sft"), of_stage(alone, "projector_sft"), strict=True):
        # That of a refresh magnifies the rounding of the updates before it: 0.7 % was seen where AVX-512 computes.
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-2)
    for arm in ARMS:
        (ours,), (theirs,) = (of_stage(lines, "rl", arm=arm, step=1) for lines in (found, alone))
        exact = ["reward_mean", "tokens_mean", "latent_steps_mean", "train_tokens_total"]
        assert {key: ours[key] for key in exact} == {key: theirs[key] for key in exact}
        near = ["loss", "grad_norm", "kl", "correction_mean"]
        assert {key: ours[key] for key in near} == pytest.approx({key: theirs[key] for key in near}, rel=1e-2, abs=1e-5)
