"""The reward, tried once on a made-up completion: the user's file is imported and its function called."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from lrscale.config.diagnosis import Check
from lrscale.config.recipe import Recipe
from lrscale.records import Prompt, Rollout, Score, ScoreFailed
from lrscale.reward.scorer import build_scorer
from lrscale.tasks.catalog import build_task, task_score

_LIMIT_S = 120.0
_IDS = (0, 0, 0)


def check_reward(recipe: Recipe, recipe_dir: Path, limit_s: float = _LIMIT_S) -> Check:
    """Score one completion of the first training prompt, in a thread that is not waited for beyond the limit."""
    results: list[Check] = []
    thread = threading.Thread(target=lambda: results.append(_tried(recipe, recipe_dir)), daemon=True)
    thread.start()
    thread.join(limit_s)
    if results:
        return results[0]
    help_ = "see what it waits for (a server that does not answer?), or make it faster"
    return Check("reward", "failed", f"no score after {limit_s:g} s", needed="one score", help=help_)


def _tried(recipe: Recipe, recipe_dir: Path) -> Check:
    try:
        task = build_task(recipe.task, seed=recipe.seed, recipe_dir=recipe_dir)
        prompt = task.prompts("train", markers=True)[0]
        scorer = build_scorer(recipe.reward, task_score(task), recipe_dir=recipe_dir)
        completion = _completion(prompt)
        scorer.submit("preflight", prompt, _rollout(), completion)
        (result,) = scorer.drain().values()
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
