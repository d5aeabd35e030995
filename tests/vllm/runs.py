"""Runs with vLLM engines, started as users start them, and what their folders say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lrscale.report.metrics import of_stage, read_metrics
from tests.distributed.ranks import ROOT

PROMPTS, SAMPLES = 4, 3
"""Of a step of tiny-short."""
SMALL = (
    "rollout.kind=vllm",
    "rollout.max_new_tokens=72",
    "rollout.enforce_eager=true",
    "rollout.batch_rows=16",
    "rollout.max_model_len=512",
    "stages.run=[rl]",
    "stages.rl.save_rollouts_every=1",
)
"""RL alone, on an engine that starts soon."""


def started(log: Path, *words: str) -> subprocess.Popen[bytes]:
    """`lrscale WORDS` in the folder of its log."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "lrscale", *words],
            cwd=log.parent, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def launched(log: Path, name: str, settings: Sequence[str]) -> subprocess.Popen[bytes]:
    """A run of tiny-short with SMALL and these settings, in runs/NAME beside its log."""
    options = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    return started(log, "launch", "tiny-short", "--name", name, *options)


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 420
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


def rl_steps(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return list(of_stage(read_metrics(path), "rl")) if path.is_file() else []


def assert_complete(run: Path, line: dict[str, Any]) -> None:
    """Every sample of a step once, all of the weights that the step before left."""
    rows = [json.loads(row) for row in (run / "rollouts" / f"latent-step-{line['step']}.jsonl").open()]
    counts = Counter(row["prompt_id"] for row in rows)
    assert len(counts) == PROMPTS and set(counts.values()) == {SAMPLES}
    assert {row["policy_version"] for row in rows} == {line["step"] - 1}
    assert line["scores_failed"] == 0
