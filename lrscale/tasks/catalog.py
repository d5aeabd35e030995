"""From a recipe's task section to the task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lrscale.config.task import FlawedFictionsConfig, FlawedStoriesConfig, JsonlConfig, NextChapterConfig, TaskConfig
from lrscale.records import Prompt, Score
from lrscale.tasks.flawed_fictions import FlawedFictions
from lrscale.tasks.flawed_stories import FlawedStories
from lrscale.tasks.jsonl import Jsonl
from lrscale.tasks.next_chapter import NextChapter
from lrscale.tasks.rows import Encode
from lrscale.tasks.task import Task


def build_task(config: TaskConfig, *, seed: int, recipe_dir: Path, encode: Encode | None = None) -> Task:
    """The task that a recipe names, its data read and checked.

    `encode` counts the tokens of prompts the way the policy will read them; without it their length
    goes unchecked. ValueError names every broken row with its place.
    """
    match config:
        case FlawedStoriesConfig():
            return FlawedStories(config, seed=seed)
        case FlawedFictionsConfig():
            return FlawedFictions(config, recipe_dir=recipe_dir, encode=encode)
        case JsonlConfig():
            return Jsonl(config, recipe_dir=recipe_dir, encode=encode)
        case NextChapterConfig():
            return NextChapter(config, recipe_dir=recipe_dir, encode=encode)


def task_score(task: Task) -> Callable[[Prompt, str], Score] | None:
    """The task's own rule for the scorer; None where the recipe's reward decides (jsonl, next_chapter)."""
    return None if isinstance(task, Jsonl | NextChapter) else task.score
