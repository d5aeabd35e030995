"""Whole runs of the shipped tiny base, a few steps long."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrscale.config.recipe import Recipe

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "projector": {"kind": "normalised"},
    "task": {
        "kind": "flawed_stories",
        "world": "ring",
        "events": [4, 4],
        "prompt_style": "brief",
        "train_prompts": 24,
        "eval_prompts": 6,
    },
    "rollout": {"max_new_tokens": 72},
    "parallel": {"threads": 1},
    "report": {"html": False},
    "stages": {
        "traces": {"prompts": 12, "samples_per_prompt": 2, "prompts_per_batch": 6, "heldout_share": 0.3},
        "projector_sft": {"batch_rows": 4, "max_steps": 4, "checkpoint_every": 2, "alignment": {"epochs": 10}},
        "rl": {
            "arms": ["latent", "discrete"],
            "steps": 3,
            "prompts_per_step": 4,
            "group_size": 3,
            "learning_rate": 1e-4,
            "minibatches": 2,
            "checkpoint_every": 2,
            "audit_every": 1,
            "save_rollouts_every": 2,
            "kl": {"coefficient": 0.01},
            "importance": {"old_logprobs": "recomputed", "correction_cap": 2.0},
            "refresh": {"every_steps": 2, "share": 0.5},
        },
        "evaluate": {"prompts": 6, "shown_rollouts": 2},
    },
}


def new_run(folder: Path, recipe: dict[str, Any] = RECIPE) -> Path:
    """A run directory as `lrscale launch` makes it, as far as the worker looks at it."""
    folder.mkdir(parents=True)
    text = Recipe.model_validate(recipe).model_dump_json(indent=2)
    (folder / "recipe.json").write_text(text, encoding="utf-8")
    return folder


def _work(*arguments: str) -> None:
    from lrscale.stages.worker import main

    os._exit(main(list(arguments)))


class Workers:
    """Workers as processes of their own, forked from a server that has imported everything once."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lrscale.stages.worker"])

    def start(self, run_dir: Path, *options: str) -> Any:
        process = self._context.Process(target=_work, args=(str(run_dir), *options))
        process.start()
        return process

    def run(self, run_dir: Path, *options: str) -> int:
        """To the end; the exit code."""
        process = self.start(run_dir, *options)
        process.join()
        return process.exitcode

    def stop_when(self, run_dir: Path, moment: Callable[[], bool], signal_number: int = signal.SIGKILL) -> int:
        """Start, and send the signal as soon as `moment()` is true; the exit code (-9 for a kill)."""
        process = self.start(run_dir)
        while process.is_alive() and not moment():
            time.sleep(0.003)
        if process.is_alive():
            os.kill(process.pid, signal_number)
        process.join()
        return process.exitcode


@pytest.fixture(scope="session")
def workers() -> Workers:
    return Workers()


@pytest.fixture(scope="session")
def finished_run(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run_dir = new_run(tmp_path_factory.mktemp("e2e") / "whole")
    assert workers.run(run_dir) == 0
    return run_dir
