"""The reward, tried once on a made-up completion: the user's file is imported and its function called."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import torch

from lrscale.config.diagnosis import Check
from lrscale.config.recipe import Recipe
from lrscale.records import Prompt, Rollout, Score, ScoreFailed
from lrscale.reward.build import Surroundings, build_scorer
from lrscale.tasks.catalog import build_task, task_score

_LIMIT_S = 120.0
_IDS = (0, 0, 0)
_KEY = "preflight"


def check_reward(recipe: Recipe, recipe_dir: Path, limit_s: float = _LIMIT_S) -> Check:
    """Score one completion of the first training prompt, where the run will: in a worker that can be killed."""
    try:
        task = build_task(recipe.task, seed=recipe.seed, recipe_dir=recipe_dir)
        prompt = task.prompts("train", markers=True)[0]
        completion = _completion(prompt)
        with closing(build_scorer(recipe.reward, task_score(task), Surroundings(recipe_dir))) as scorer:
            scorer.begin([_KEY])
            scorer.submit(_KEY, prompt, _rollout(), completion)
            deadline = time.monotonic() + limit_s
            while not scorer.wait(min(0.5, limit_s)):
                if time.monotonic() > deadline:
                    help_ = "see what it waits for (a server that does not answer?), or make it faster"
                    return Check("reward", "failed", f"no score after {limit_s:g} s", needed="one score", help=help_)
            result = scorer.drain()[_KEY]
    except Exception as error:  # noqa: BLE001 - data, imports and a user's code: whatever it is, the run would meet it
        found = str(error) or type(error).__name__
        help_ = "mend the task's data or the reward function"
        return Check("reward", "failed", found, needed="data that can be read, and a score", help=help_)
    if isinstance(result, ScoreFailed):
        help_ = f"mend the function; it was given the completion {completion!r}"
        return Check("reward", "failed", f"{result.kind}: {result.detail}", needed="a finite number", help=help_)
    assert isinstance(result, Score)
    return Check("reward", "ok", f"{result.value:g} for the made-up completion {completion!r}")


def _completion(prompt: Prompt) -> str:
    """The right answer in the form that most rewards look for."""
    answer = prompt.columns.get("answer", "Yes")
    return f"\\boxed{{{answer}}}"


def _rollout() -> Rollout:
    nothing = torch.zeros(0, 1)
    return Rollout(_IDS, _IDS, torch.zeros(len(_IDS)), (), nothing, policy_version=0, stop_reason="stop")
