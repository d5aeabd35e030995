"""What a whole run leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrscale.report.metrics import of_stage, read_metrics
from lrscale.stages import evaluate, generate
from lrscale.stages.rollout_io import load_rollouts, read_json_lines
from tests.e2e.conftest import RECIPE, Workers, new_run


@pytest.fixture(scope="module")
def metrics(finished_run: Path) -> list[dict]:
    return read_metrics(finished_run / "metrics.jsonl")


def test_every_stage_reports(metrics: list[dict]):
    """Keys that the report reads must be there: it shows a missing one as nothing."""
    counts = {stage: len(of_stage(metrics, stage)) for stage in ("traces", "alignment", "rl", "evaluate", "arm")}
    assert counts == {"traces": 2, "alignment": 10, "rl": 6, "evaluate": 4, "arm": 2}
    first, refresh = (of_stage(metrics, "projector_sft", arm=arm) for arm in (None, "latent"))
    assert [line["step"] for line in first] == [1, 2, 3, 4] and refresh and refresh[0]["refresh"] == 1
    assert [(line["arm"], line["refresh"]) for line in of_stage(metrics, "heldout")] == [(None, 0), ("latent", 1)]
    rl = of_stage(metrics, "rl", arm="latent")[-1]
    for key in ("reward_mean", "accuracy", "tokens_mean", "latent_steps_mean", "markers_mean", "steps_per_marker_mean"):
        assert rl[key] is not None
    for key in ("loss", "grad_norm", "clip_share", "kl", "logprob_gap_mean", "logprob_gap_max", "learning_rate"):
        assert isinstance(rl[key], float)
    for key in ("no_answer_share", "groups_without_signal", "scores_failed", "train_tokens_total", "cpu_s"):
        assert key in rl
    assert {"rollout_s", "score_s", "update_s", "refresh_s", "step_s"} <= rl.keys()


def test_latents_are_live_and_replay_exactly(metrics: list[dict]):
    """Recorded latents, recomputed ones and log-probs agree; a dead projector would agree as well, hence the scale."""
    audits = of_stage(metrics, "audit", arm="latent")
    assert len(audits) == 3 and not of_stage(metrics, "audit", arm="discrete")
    assert all(line["latent_cosine_min"] > 0.9999 and line["logprob_gap_max"] < 1e-3 for line in audits)
    assert all(0.1 < line["latent_scale"] < 10 for line in of_stage(metrics, "projector_sft"))
    assert all(line["logprob_gap_max"] < 1e-3 for line in of_stage(metrics, "rl"))


def test_arms_meet_the_same_prompts_and_only_one_uses_latents(finished_run: Path, metrics: list[dict]):
    lines = {arm: read_json_lines(finished_run / "rollouts" / f"{arm}-step-2.jsonl") for arm in ("latent", "discrete")}
    assert [line["prompt_id"] for line in lines["latent"]] == [line["prompt_id"] for line in lines["discrete"]]
    assert "implicit_thought" in lines["latent"][0]["prompt"]
    assert "implicit_thought" not in lines["discrete"][0]["prompt"]
    assert all(line["latent_steps_mean"] == 0 for line in of_stage(metrics, "rl", arm="discrete"))
    assert any(line["latent_steps_mean"] > 0 for line in of_stage(metrics, "rl", arm="latent"))
    assert load_rollouts(finished_run / "rollouts" / "latent-step-2.jsonl")[0].policy_version == 1
    scales = {arm: [line["latent_scale"] for line in of_stage(metrics, "rl", arm=arm)] for arm in lines}
    assert any(scales["latent"]) and not any(scales["discrete"])


def test_what_a_finished_arm_leaves_behind(finished_run: Path):
    """Optimizer states of every step would fill the disk; a buffer that nothing fills is clutter."""
    for stage in ("projector_sft", "latent", "discrete"):
        assert len(list((finished_run / "checkpoints" / stage).glob("step-*"))) == 1
    assert {path.name.split("-")[0] for path in (finished_run / "rollouts").glob("*-refresh-*")} == {"latent"}


def test_an_arm_is_the_same_whatever_ran_before_it(
    workers: Workers, finished_run: Path, metrics: list[dict], tmp_path: Path
):
    """The discrete arm must not inherit the latent arm's weights, moments or random streams."""
    alone = tmp_path / "alone"
    shutil.copytree(finished_run, alone, symlinks=True)
    for folder in ("models", "checkpoints/latent", "checkpoints/discrete"):
        shutil.rmtree(alone / folder)
    (alone / "done.json").unlink()
    recipe = json.loads((alone / "recipe.json").read_text())
    recipe["stages"]["rl"]["arms"] = ["discrete"]
    (alone / "recipe.json").write_text(json.dumps(recipe))
    assert workers.run(alone) == 0

    def figures(lines: list[dict], stage: str) -> list[dict]:
        found = of_stage(lines, stage, arm="discrete")
        return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in found]

    again = read_metrics(alone / "metrics.jsonl")
    assert not of_stage(again, "rl", arm="latent")
    for stage in ("rl", "evaluate"):
        assert figures(again, stage) == figures(metrics, stage) != []


def test_models_load_in_plain_transformers(finished_run: Path):
    for arm in RECIPE["stages"]["rl"]["arms"]:
        model = AutoModelForCausalLM.from_pretrained(finished_run / "models" / arm)
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_evaluate_alone_gives_the_runs_own_figures(finished_run: Path, metrics: list[dict], capsys):
    """The saved model is the trained one: same prompts, same streams, same accuracy and lengths."""
    assert evaluate.main([str(finished_run)]) == 0
    for line in capsys.readouterr().out.splitlines():
        found = json.loads(line)
        own = of_stage(metrics, "evaluate", arm=found["arm"], when="after")[0]
        for key in ("accuracy", "accuracy_low", "tokens_mean", "latent_steps_mean", "marker_histogram"):
            assert found[key] == own[key], key


def test_generate_shows_latent_steps_as_dots(finished_run: Path, capsys):
    prompt = "1. Dan starts at the port. <implicit_thought>3</implicit_thought>"
    model = str(finished_run / "models" / "latent")
    assert generate.main(["--temperature=0", "--max-new-tokens=20", "--", model, prompt]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith((generate.DOT * 3, generate.PLAIN_DOT * 3))
    assert "latent steps" in shown.err


def test_own_prompts_own_reward_and_rl_alone(workers: Workers, tmp_path: Path):
    """stages.run without traces and SFT, markers in the prompts themselves, a reward that fails now and then."""
    rows = [
        {"prompt": f"{n}. Dan starts at the mill. <implicit_thought>2</implicit_thought>", "odd": n % 2}
        for n in range(6)
    ]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "reward.py").write_text(
        "def reward(prompts, completions, odd, **columns):\n"
        "    return [float('nan') if len(c) % 7 == 0 else float(len(c) % 2 == o) for c, o in zip(completions, odd)]\n",
        encoding="utf-8",
    )
    recipe = {
        "name": "own",
        "projector": {"kind": "normalised"},
        "task": {"kind": "jsonl", "train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"),
                 "marker_paragraph": False},
        "reward": {"kind": "function", "path": str(tmp_path / "reward.py"), "max_failed_share": 0.9,
                   "length_penalty": {"price_per_100": 0.5}},
        "rollout": {"max_new_tokens": 24, "batch_rows": 8},
        "parallel": {"threads": 1},
        "report": {"html": False},
        "stages": {
            "run": ["rl", "evaluate"],
            "rl": {"arms": ["shuffled_latent"], "steps": 2, "prompts_per_step": 3, "group_size": 3,
                   "learning_rate": 1e-4, "refresh": {"every_steps": 2, "share": 1.0}},
            "evaluate": {"prompts": 4, "samples_per_prompt": 2},
        },
    }  # fmt: skip
    run_dir = new_run(tmp_path / "own", recipe)
    assert workers.run(run_dir) == 0
    metrics = read_metrics(run_dir / "metrics.jsonl")
    steps = of_stage(metrics, "rl")
    assert len(steps) == 2 and all(line["latent_steps_mean"] >= 2 for line in steps)
    assert sum(line["scores_failed"] for line in steps) > 0
    assert of_stage(metrics, "evaluate")[-1]["samples"] == 8
    assert not of_stage(metrics, "traces") and not of_stage(metrics, "heldout")
    assert (run_dir / "models" / "shuffled_latent" / "config.json").is_file()
