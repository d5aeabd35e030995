"""Runs whose rewards hang, fail, come in any order, or are still out when the run is stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from lrscale.report.metrics import of_stage, read_metrics, without_times
from tests.e2e.conftest import Workers, new_run


def recipe(folder: Path, source: str, *, steps: int = 2, reward: dict[str, Any] | None = None) -> dict[str, Any]:
    """RL alone, on prompts of its own."""
    rows = [{"prompt": f"{n}. Dan starts at the mill.", "number": n} for n in range(4)]
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reward.py").write_text(source, encoding="utf-8")
    return {
        "name": "rewards",
        "projector": {"kind": "normalised"},
        "task": {"kind": "jsonl", "train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"),
                 "marker_paragraph": False},
        "reward": {"kind": "function", "path": str(folder / "reward.py"), "max_failed_share": 0.5,
                   "pool": {"workers": 2}, **(reward or {})},
        "rollout": {"max_new_tokens": 16, "batch_rows": 8},
        "parallel": {"threads": 1},
        "report": {"html": True},
        "stages": {
            "run": ["rl"],
            "rl": {"arms": ["discrete"], "steps": steps, "prompts_per_step": 3, "group_size": 3, "learning_rate": 1e-4,
                   "checkpoint_every": 10, "save_rollouts_every": 1},
        },
    }  # fmt: skip


def training(run_dir: Path) -> list[dict]:
    return [without_times(line) for line in read_metrics(run_dir / "metrics.jsonl")]


HANGS = """
import time
def reward(completions, number):
    if number[0] == 1 and len(completions[0]) % 3 == 0:
        time.sleep(1000)
    if number[0] == 2 and len(completions[0]) % 3 == 0:
        raise KeyError("no such story")
    return [float(len(completions[0]) % 2)]
"""


def test_a_reward_that_hangs_costs_its_own_samples_and_the_report_says_so(workers: Workers, tmp_path: Path):
    """Two hours later this used to be a time-out of NCCL."""
    run_dir = new_run(
        tmp_path / "run", recipe(tmp_path, HANGS, steps=3, reward={"timeout_s": 2, "max_failed_share": 0.9})
    )
    assert workers.run(run_dir) == 0
    metrics = read_metrics(run_dir / "metrics.jsonl")
    steps, scoring = of_stage(metrics, "rl"), of_stage(metrics, "reward")
    assert [line["step"] for line in scoring] == [1, 2, 3]
    failed = [line["failed_timeout"] + line["failed_error"] for line in scoring]
    assert failed == [line["scores_failed"] for line in steps]
    assert sum(line["failed_timeout"] for line in scoring) > 0 and sum(line["failed_error"] for line in scoring) > 0
    assert all(line["samples"] == 9 and line["waited_s"] > 0 for line in scoring)
    log = (run_dir / "attempts" / "1" / "rank0.log").read_text()
    assert "score failed (timeout), prompt train-" in log and "KeyError: 'no such story'" in log
    page = (run_dir / "report.html").read_text()
    assert "hidden behind generation" in page and "timeout" in page


SCATTERED = """
import random, time
def reward(completions, number):
    time.sleep(random.Random().random() * 0.3)
    return [len(completions[0]) % 5 + 0.1 * number[0]]
def even(completions):
    return [len(completions[0]) % 2]
"""


def test_the_same_seed_trains_the_same_whatever_the_order_of_scores(workers: Workers, tmp_path: Path):
    """Advantages of a step that depended on who answered first could never be looked into again."""
    runs = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        both = recipe(folder, SCATTERED)
        path = str(folder / "reward.py")
        functions = [{"label": "odd", "path": path, "name": "reward"}, {"label": "even", "path": path, "name": "even"}]
        both["reward"] = {"kind": "functions", "functions": functions, "pool": {"workers": 2}}
        runs.append(new_run(folder / "run", both))
        assert workers.run(runs[-1]) == 0
    assert training(runs[0]) == training(runs[1])
    step = of_stage(read_metrics(runs[0] / "metrics.jsonl"), "rl")[0]
    assert step["reward_mean"] == pytest.approx(step["part_odd_mean"] + step["part_even_mean"]), "each is logged apart"
    models = [(run / "models" / "discrete" / "model.safetensors").read_bytes() for run in runs]
    assert models[0] == models[1]


GATED = """
import time
from pathlib import Path
here = Path(__file__).parent
def reward(completions, number):
    with (here / "calls").open("a") as file:
        file.write("x")
    own = f"{number[0]} {completions[0]!r}"
    slow = here / "slow"
    known = slow.read_text().splitlines() if slow.exists() else []
    if len(known) < 2:
        with slow.open("a") as file:
            print(own, file=file)
        known.append(own)
    while own in known and not (here / "open").exists():
        time.sleep(0.05)
    return [float(len(completions[0]) % 2)]
"""


MANY = {"pool": {"workers": 6}}


def test_rollouts_without_scores_survive_a_stop_and_are_scored_on_resume(workers: Workers, tmp_path: Path):
    """Hours of a judge's work, and the sampling, were lost with a Ctrl-C; and what goes on must be exact."""
    folder = tmp_path / "stopped"
    folder.mkdir()
    run_dir = new_run(folder / "run", recipe(folder, GATED, reward=MANY))
    calls = folder / "calls"

    def kept() -> list[Path]:
        return list((run_dir / "pending").glob("rank0-*.safetensors"))

    def scored_and_kept() -> bool:
        done = calls.exists() and len(calls.read_text()) == 9
        return done and any(path.stat().st_mtime > calls.stat().st_mtime for path in kept())

    assert workers.stop_when(run_dir, scored_and_kept, signal.SIGKILL) == -signal.SIGKILL
    assert kept(), "a long wait has rollouts and scores on disk before anything happens"
    assert workers.stop_when(run_dir, lambda: len(calls.read_text()) > 9, signal.SIGINT) == 130
    (folder / "open").touch()
    before = len(calls.read_text())
    assert workers.run(run_dir) == 0
    assert not kept()
    assert len(calls.read_text()) - before < 15, "what the stopped attempt had scored is not scored again"
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "open").touch()
    other = new_run(whole / "run", recipe(whole, GATED, reward=MANY))
    assert workers.run(other) == 0
    assert training(run_dir) == training(other)


BREAKS = """
from pathlib import Path
here = Path(__file__).parent
def reward(completions, number):
    with (here / "calls").open("a") as file:
        print(file=file)
    if len((here / "calls").read_text().splitlines()) > 11:
        raise RuntimeError("the judge's disk is full")
    return [float(len(completions[0]) % 2)]
"""


def test_past_its_budget_a_run_writes_a_checkpoint_says_why_and_goes_on_once_mended(workers: Workers, tmp_path: Path):
    """Step 1 is fine, step 2 fails: neither the weights of step 1 nor the rollouts of step 2 are lost."""
    run_dir = new_run(tmp_path / "run", recipe(tmp_path, BREAKS))
    assert workers.run(run_dir) == 6
    reason = json.loads((run_dir / "attempts" / "1" / "exit.json").read_text())["reason"]
    assert "7 of 9 scores failed" in reason and "the judge's disk is full" in reason
    assert (run_dir / "checkpoints" / "discrete" / "step-1").is_dir()
    assert list((run_dir / "pending").glob("rank0-*.safetensors"))
    (tmp_path / "reward.py").write_text(BREAKS.replace("> 11", "> 10**9"), encoding="utf-8")
    assert workers.run(run_dir) == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    other = new_run(whole / "run", recipe(whole, BREAKS.replace("> 11", "> 10**9")))
    assert workers.run(other) == 0
    assert training(run_dir) == training(other)
