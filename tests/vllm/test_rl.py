"""RL on two ZeRO-3 ranks with a vLLM engine: one run in which an engine, and in the end the trainer, is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lrscale.report.metrics import of_stage, read_metrics
from lrscale.rollout.vllm.client import health
from lrscale.rollout.vllm.process import read_address
from tests.distributed.ranks import ROOT
from tests.vllm.shared_memory import in_shared_memory, left_in_shared_memory

pytestmark = pytest.mark.slow

PROMPTS, SAMPLES, STEPS = 4, 3, 4
SETTINGS = (
    "parallel.kind=zero3",
    "parallel.ranks_per_node=2",
    "rollout.kind=vllm",
    "rollout.transport=broadcast",
    "rollout.latents=recompute",
    "rollout.max_new_tokens=72",
    "rollout.enforce_eager=true",
    "rollout.batch_rows=16",
    "rollout.max_model_len=512",
    "stages.run=[rl]",
    f"stages.rl.steps={STEPS}",
    "stages.rl.save_rollouts_every=1",
    "stages.rl.audit_every=1",
    "stages.rl.importance.old_logprobs=recomputed",
)


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 420
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


def test_rl_goes_on_over_a_dead_engine_and_a_dead_trainer_leaves_nothing(tmp_path: Path):
    """Locks out steps without fresh weights, steps that lack samples or have some twice after an engine's death, and
    engines and shared memory that outlive a trainer that was killed.
    """
    shared = in_shared_memory()
    log, run = tmp_path / "log", tmp_path / "runs" / "rl"
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lrscale", "launch", "tiny-short", "--name", "rl", *options],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    trainer = psutil.Process(process.pid)
    known: dict[int, psutil.Process] = {}
    address = run / "attempts" / "latest" / "engines" / "engine-0.address.json"

    def said() -> dict[str, Any]:
        url = read_address(address)
        return (health(url) if url is not None else None) or {}

    def sampling() -> bool:
        seen = said()
        return seen.get("version") in (1, 2) and bool(seen.get("running"))

    def steps() -> list[dict[str, Any]]:
        path = run / "metrics.jsonl"
        return list(of_stage(read_metrics(path), "rl")) if path.is_file() else []

    try:
        until(sampling, process, log)  # within step 2, or 3
        first = read_address(address)
        cores = [p for p in trainer.children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
        os.kill(cores[0].pid, signal.SIGKILL)
        until(lambda: len(steps()) >= STEPS - 1, process, log)
        assert read_address(address) != first
        known = {p.pid: p for p in trainer.children(recursive=True)}
        ranks = [p for p in known.values() if "lrscale.stages" in p.cmdline() and "worker" in p.cmdline()]
        assert len(ranks) >= 2
        for rank in ranks:
            rank.kill()
        process.wait(120)
    finally:
        process.kill()
        process.wait()
    alive = psutil.wait_procs(list(known.values()), timeout=60)[1]
    assert not alive
    assert not left_in_shared_memory(shared)

    done = steps()[: STEPS - 1]
    assert [line["step"] for line in done] == [1, 2, 3]
    for line in done:
        assert_complete(run, line)


def assert_complete(run: Path, line: dict[str, Any]) -> None:
    """Every sample of a step once, all of the weights that the step before left."""
    rows = [json.loads(row) for row in (run / "rollouts" / f"latent-step-{line['step']}.jsonl").open()]
    counts = Counter(row["prompt_id"] for row in rows)
    assert len(counts) == PROMPTS and set(counts.values()) == {SAMPLES}
    assert {row["policy_version"] for row in rows} == {line["step"] - 1}
    assert 0 <= line["engine_gap_mean"] <= line["engine_gap_max"] < 0.05
    assert line["scores_failed"] == 0
