"""The command line as a new user meets it, wrong inputs above all: no traceback, and an exit code that means something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrscale.cli.app import app

ROOT = Path(__file__).resolve().parents[2]


HUGE = ("--engine", "vllm", "--constant", "overheads.engine_start_s=1e308")


def lrscale(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lrscale.cli", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["lanch"], 2, "launch"),
        (["launch", "--bogus"], 2, "--bogus"),
        (["launch", "nothing.yaml"], 7, "does not exist"),
        (["launch", "tny-cpu"], 7, "did you mean tiny-cpu?"),
        (["launch", "--set", "stages.rl.stps=3"], 3, "did you mean stages.rl.steps?"),
        (["launch", "--set", "seed"], 3, "key=value"),
        (["launch", "--name", "../x"], 3, "name is"),
        (["launch", "llama3-70b-8n8g", "--local"], 3, "this machine is one node"),
        (["launch", "--nodes", "0"], 2, "--nodes"),
        (["launch", "--time", "1:x", "--dry-run"], 3, "--time 1:x cluster.time_limit"),
        (["launch", "bad.yaml"], 3, "bad.yaml:2 sed"),
        (["show", "bad.yaml"], 3, "did you mean seed?"),
        (["evaluate", "runs/none"], 7, "does not exist"),
        (["evaluate", "./none"], 7, "does not exist"),
        (["evaluate", "builtin:tiny", "--set", "x=1"], 3, "unknown key x"),
        (["generate", "runs/none", "hello"], 7, "does not exist"),
        (["generate", "builtin:tiny", "hello", "--arm", "latent"], 2, "--arm"),
        (["generate", "builtin:tiny", "hello", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["generate", "builtin:tiny"], 2, "PROMPT"),
        (["report", "runs/none"], 7, "does not exist"),
        (["report"], 2, "RUN"),
        (["status", "none"], 7, "none is no run"),
        (["status", "runs"], 7, "no recipe.json"),
        (["logs", "none"], 7, "none is no run"),
        (["logs"], 2, "RUN"),
        (["stop", "none"], 7, "none is no run"),
        (["resume", "none"], 7, "none is no run"),
        (["doctor", "nothing.yaml"], 7, "does not exist"),
        (["plan", "--nodes", "0"], 2, "--nodes"),
        (["plan", "--gpu", "h100"], 3, "did you mean h100-80?"),
        (["plan", "llama3-70b-8n8g", "--nodes", "7"], 3, "768 sequences"),
        (["plan", "llama3-70b-8n8g", "--engine", "vllm", "--tensor-parallel", "5"], 3, "the 64 GPUs that generate"),
        (["plan", "--set", "model.path=meta-llama/Llama-3.1-70"], 3, "did you mean meta-llama/Llama-3.1-70B"),
        (["plan", "--set", "model.path=lacking"], 3, "num_hidden_layers is missing"),
        (["plan", "--set", "model.path=broken"], 3, "broken/config.json: it cannot be read as JSON: Expecting value"),
        (["plan", "--set", "model.path=blank"], 3, "blank/config.json: it holds {} in place of the keys of a model"),
        (["plan", "--set", "model.path=runs"], 3, "runs: no config.json of it is on this machine"),
        (
            ["plan", "--set", "rollout.max_new_tokens=600"],
            3,
            "600 positions (rollout.max_new_tokens 600), builtin:tiny has 512",
        ),
        (["plan", "--steps", "5", "--seeds", "2"], 2, "--steps, --seeds: read by the simulation alone"),
        (["plan", "--mean-new-tokens", "5000"], 3, "above rollout.max_new_tokens, which is"),
        (["plan", "--lengths-from", "runs", "--spread", "1"], 2, "both say how long"),
        (["plan", "--spread", "50"], 2, "'--spread': given 50, needed a number of at least 0 and at most 3"),
        (["plan", "--latent-share", "1"], 2, "'--latent-share': given 1, needed a number of at least 0 and below 1"),
        (["plan", "--constant", "sequences.length_spread=50"], 3, "sequences.length_spread.value"),
        (["plan", "--constant", "sequences.latent_share=1"], 3, "sequences.latent_share.value"),
        (["plan", "--json", "--constant", "overheads.start_s=1e308", *HUGE], 2, "not finite"),
        (["plan", "--lengths-from", "runs"], 7, "holds no lengths"),
        (["report", "runs", "--out", "x.txt"], 2, "x.html"),
        (["generate", "builtin:tiny", "hello", "--max-new-tokens", "100000"], 3, "lower --max-new-tokens"),
    ],
)
def test_wrong_inputs_are_answered(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    """Locks out tracebacks, prose on stdout and exit code 1 for everything."""
    (tmp_path / "bad.yaml").write_text("# a comment\nsed: 3\n")
    (tmp_path / "runs").mkdir()
    for name, text in {"lacking": '{"model_type": "llama", "hidden_size": 64}', "broken": "", "blank": "{}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    done = lrscale(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and done.stdout == ""


def test_dry_run_writes_nothing_and_names_the_run_directory(tmp_path: Path) -> None:
    done = lrscale("launch", "--dry-run", "--name", "x1e3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/x1e3\n")
    assert "would begin" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_show_prints_a_recipe_that_launch_takes(tmp_path: Path) -> None:
    done = lrscale("show", "smoke-1gpu", "--set", "name=1e3", "--set", "name='1e3'", cwd=tmp_path)
    assert json.loads(done.stdout)["name"] == "1e3"
    (tmp_path / "again.json").write_text(done.stdout)
    assert lrscale("show", "again.json", cwd=tmp_path).stdout == done.stdout


def test_a_plan_is_numbers_on_stdout_and_says_what_it_assumes(tmp_path: Path) -> None:
    """Locks out tables that scripts would have to parse, and assumptions that nobody hears of."""
    done = lrscale(
        "plan", "llama3-70b-8n8g", "--json", "--nodes", "2", "--gpu", "h200-141", "--price", "3", cwd=tmp_path
    )
    planned = json.loads(done.stdout)
    assert (planned["layout"]["gpus"], planned["fits"], planned["gpu"]) == (16, False, "h200-141")
    assert planned["overflow"]["limit_gib"] == 140.4 and planned["suggestions"]
    assert planned["cost"]["price"] == pytest.approx(3 * planned["cost"]["gpu_hours"])
    assert "assumed: prompts of 4,096 tokens (--prompt-tokens)" in done.stderr
    split = json.loads(lrscale("plan", "llama3-70b-split", "--json", cwd=tmp_path).stdout)
    assert (split["layout"]["tensor_parallel"], split["layout"]["rollout_nodes"], split["fits"]) == (4, 2, True)
    shown = lrscale("plan", "tiny-cpu", "--prompt-tokens", "200", cwd=tmp_path)
    assert "fits: " in shown.stdout and "--prompt-tokens" not in shown.stderr and "runs on CPUs" in shown.stderr
    mixture = lrscale("plan", "qwen3-4b-1gpu", "--set", "model.path=Qwen/Qwen3-30B-A3B", "--json", cwd=tmp_path)
    assert mixture.returncode == 0 and "no projector can be cloned from" in mixture.stderr
    assert "mixture" not in done.stderr


@pytest.mark.parametrize("given", ["inf", "nan", "-1", "much"])
@pytest.mark.parametrize(
    "option",
    ["prompt-tokens", "mean-new-tokens", "spread", "latent-share", "scoring-s", "reward-s", "price", "requeue-s",
     "failures-per-node-day"],
)  # fmt: skip
def test_a_number_that_is_none_is_refused_by_name(option: str, given: str) -> None:
    """Locks out infinite prices, and times in JSON that no parser takes."""
    done = CliRunner().invoke(app, ["plan", "--simulate", f"--{option}", given])
    assert done.exit_code == 2 and f"--{option}" in done.output and f"given {given}, needed" in done.output


def test_a_run_is_simulated_with_the_lengths_of_one_that_went_before(tmp_path: Path) -> None:
    """Locks out --simulate, --lengths-from and --charts that work in the library alone; ordinary RL by its other name."""
    rollouts = tmp_path / "before" / "rollouts"
    rollouts.mkdir(parents=True)
    for arm, tokens, latents in (("latent", 20, 10), ("discrete_free", 80, 0)):
        lines = [{"arm": arm, "tokens": tokens, "latent_steps": latents, "prompt_ids": [1] * 50}] * 4
        (rollouts / f"{arm}-step-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    simulate = ("plan", "tiny-cpu", "--set", "stages.rl.arms=[latent]", "--simulate", "--steps", "3", "--seeds", "2")
    done = lrscale(*simulate, "--lengths-from", "before", "--charts", "drawn", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    found = printed["simulation"]
    assert (found["steps"], found["seeds"]) == (3, 2)
    assert (printed["workload"]["lengths"]["mean"], printed["workload"]["prompt_tokens"]) == (30, 50)
    assert "assumed" not in done.stderr
    by_words = {arm["name"]: arm["tokens"] + arm["latent_steps"] for arm in found["reasoning"]}
    assert sorted(by_words.values()) == [30, 80], by_words
    drawn = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert drawn >= {"plan.json", "plan-step.png", "plan-memory.png"}, done.stderr
    refused = lrscale(*simulate, "--lengths-from", "drawn", cwd=tmp_path)
    assert refused.returncode == 7 and "holds no lengths" in refused.stderr


def test_recipes_are_listed_with_what_they_are_for(tmp_path: Path) -> None:
    lines = lrscale("recipes", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "llama3-70b-8n8g",
        "llama3-70b-split",
        "qwen3-4b-1gpu",
        "smoke-1gpu",
        "tiny-cpu",
        "tiny-short",
    ]
    assert all(len(line.split()) > 4 for line in lines)


def test_version_and_help(tmp_path: Path) -> None:
    assert lrscale("--version", cwd=tmp_path).stdout.startswith("lrscale ")
    out = lrscale("--help", cwd=tmp_path).stdout
    assert all(name in out for name in ("launch", "evaluate", "generate", "report", "recipes", "show"))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    """Locks out a second launch that trains once more over a finished run."""
    shown = lrscale("show", cwd=tmp_path).stdout
    run = tmp_path / "runs" / "tiny-cpu"
    run.mkdir(parents=True)
    for name, text in {"recipe.json": shown, "done.json": "{}", "report.html": ""}.items():
        (run / name).write_text(text)
    done = lrscale("launch", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/tiny-cpu\n")
    assert "runs/tiny-cpu is finished; read runs/tiny-cpu/report.html" in done.stderr


def test_a_reward_is_tried_on_a_file_of_rollouts(tmp_path: Path) -> None:
    """Debugging a reward takes no GPU: columns come from the task, hangs are ended, tracebacks are shown."""
    (tmp_path / "reward.py").write_text(
        "import time\n"
        "def reward(completions, answer):\n"
        "    if completions[0] == 'slow': time.sleep(1000)\n"
        "    return [{'right': 1.0}[c] if c != a else 0.5 for c, a in zip(completions, answer)]\n"
    )
    rows = [{"prompt": f"question {n}", "answer": f"answer {n}"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        "task: {kind: jsonl, train: rows.jsonl, eval: rows.jsonl}\n"
        "reward: {kind: function, path: reward.py, timeout_s: 8, pool: {workers: 2}, length_penalty: {price_per_100: 10}}\n"
    )
    texts = ["right", "slow", "answer 2", "wrong"]
    lines = [
        {"prompt_id": f"train-{n % 3 + 1:06d}", "prompt": f"question {n % 3}", "segments": [{"text": text[:2]}, {"latent_steps": 3},
         {"text": text[2:]}], "reward": 0.25, "prompt_ids": [1], "completion_ids": [1, 2], "latent_spans": [[2, 3]],
         "stop_reason": "stop"}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = lrscale("reward", "recipe.yaml", "--rollouts", "rollouts.jsonl", cwd=tmp_path)
    assert done.returncode == 6, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("failed", line["reward"]) for line in found] == [0.5, "timeout", 0.0, "error"]
    assert found[0]["parts"] == {"task": 1.0, "length": -0.5} and found[0]["reward_in_run"] == 0.25
    assert "KeyError: 'wrong'" in found[3]["detail"]
    assert "2 of 4 scored, mean 0.2500, 1 timeout, 1 error" in done.stderr
    for arguments, code, said in (
        (["recipe.yaml", "--rollouts", "none.jsonl"], 7, "no such file"),
        (["recipe.yaml", "--rollouts", "rows.jsonl"], 3, "holds no 'prompt_id'"),
    ):
        refused = lrscale("reward", *arguments, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (code, "") and said in refused.stderr
    assert lrscale("serve-reward", "none.py", cwd=tmp_path).returncode == 7
