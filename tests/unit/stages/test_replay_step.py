"""A failed update, kept and run again row by row: the row and the module are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lrscale.config.optimisation import OptimisationConfig
from lrscale.config.recipe import Recipe
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.single import SingleEngine
from lrscale.stages import replay_step
from lrscale.stages.failed_step import save_failed_step
from lrscale.stages.lite_rows import LiteRow
from lrscale.stages.update import Row
from tests.unit.latent.tiny_models import live_policy


@pytest.fixture(params=["float32", "bfloat16"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, SingleEngine, list[Row]]:
    """A run directory, the engine that failed in it, and four finite rows with latents.

    Narrow weights too: their gradients stand elsewhere, and most of what overflows is narrow.
    """
    policy = live_policy(dtype=getattr(torch, request.param))
    policy.save_pretrained(tmp_path / "model")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    recipe = Recipe.model_validate(
        {"model": {"path": str(tmp_path / "model"), "device": "cpu", "dtype": request.param}}
    )
    (run_dir / "recipe.json").write_text(recipe.model_dump_json(), encoding="utf-8")
    prompts = [[*policy.encode(f"row {index} "), *policy.marker_ids(2)] for index in range(4)]
    rollouts = policy.generate(prompts, max_new_tokens=10, seed=1)
    rows = [Row(f"p{index}/0", rollout, 1.0 - index) for index, rollout in enumerate(rollouts)]
    return run_dir, SingleEngine(policy, OptimisationConfig(), ranks=Ranks()), rows


def test_the_poisoned_row_is_found(run, capsys: pytest.CaptureFixture[str]):
    run_dir, engine, rows = run
    latents_LH = torch.full_like(rows[2].rollout.latents_LH, float("nan"))
    rows[2] = replace(rows[2], rollout=replace(rows[2].rollout, latents_LH=latents_LH))
    save_failed_step(engine, run_dir, rows, arm="latent", step=5)
    assert replay_step.main([str(run_dir)]) == 0
    captured = capsys.readouterr()
    results = [json.loads(line) for line in captured.out.splitlines()]
    assert [result["finite"] for result in results] == [True, True, False, True]
    assert results[2]["first_module"] == "model.model.layers.0.input_layernorm (its input is not finite either)"
    assert "1 of 4 rows are not finite, first p2/0" in captured.err


def test_the_weights_are_those_of_the_failure(run, capsys: pytest.CaptureFixture[str]):
    """The recipe's model has moved on since, or never was what failed."""
    run_dir, engine, rows = run
    with torch.no_grad():
        engine.policy.model.lm_head.weight[7, 3] = float("inf")
    save_failed_step(engine, run_dir, rows[:1], arm="latent", step=5)
    assert replay_step.main([str(run_dir)]) == 0
    assert "model.lm_head (its input is finite)" in capsys.readouterr().err


def test_rows_that_are_all_finite_are_said_to_be(run, capsys: pytest.CaptureFixture[str]):
    run_dir, engine, rows = run
    row = rows[0].rollout
    lite = LiteRow("p0", (*row.prompt_ids, *row.completion_ids), tuple(row.latent_spans), ((),) * len(row.latent_spans))
    save_failed_step(engine, run_dir, [lite], arm=None, step=3)
    assert replay_step.main([str(run_dir), "--step", "projector_sft-step-3"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["grad_norm"] > 0 and "all 1 rows are finite one by one" in captured.err


def test_a_run_without_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert replay_step.main([str(tmp_path)]) == 7
    assert "holds no failed step" in capsys.readouterr().err
