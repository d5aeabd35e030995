"""The catalog builds each kind of task from its section."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrscale.config.task import FlawedFictionsConfig, FlawedStoriesConfig, JsonlConfig
from lrscale.tasks.catalog import build_task, task_score
from lrscale.tasks.flawed_fictions import FlawedFictions
from lrscale.tasks.flawed_stories import FlawedStories
from lrscale.tasks.jsonl import Jsonl


def test_each_kind_is_built_and_checked(tmp_path: Path) -> None:
    """Paths start at the recipe, the seed reaches the generator, the tokenizer reaches the row checks."""
    rows = [{"story": f"{i} foxes.", "cont_error": i % 2, "prompt": f"{i}?", "answer": i} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stories = FlawedStoriesConfig(train_prompts=3, eval_prompts=2)
    fictions = FlawedFictionsConfig(
        kind="flawed_fictions", path="rows.jsonl", prompt_style="brief", max_prompt_tokens=3
    )
    own = JsonlConfig(kind="jsonl", train="rows.jsonl", eval="rows.jsonl", max_prompt_tokens=3)
    built = [build_task(config, seed=1, recipe_dir=tmp_path) for config in (stories, fictions, own)]
    assert [type(task) for task in built] == [FlawedStories, FlawedFictions, Jsonl]
    assert built[0].prompts("train", markers=True) == FlawedStories(stories, seed=1).prompts("train", markers=True)
    assert built[0].prompts("train", markers=True) != FlawedStories(stories, seed=2).prompts("train", markers=True)
    for task in built:
        ids = [p.prompt_id for p in task.prompts("train", markers=False)]
        assert len(set(ids)) == len(ids) > 0
    for config in (fictions, own):
        with pytest.raises(ValueError, match=r"rows\.jsonl:1: the prompt has"):
            build_task(config, seed=1, recipe_dir=tmp_path, encode=str.split)


def test_only_jsonl_leaves_the_reward_to_the_user(tmp_path: Path) -> None:
    """The scorer is given None, so that reward.kind `task` is refused before anything is sampled."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?"}\n')
    own = build_task(JsonlConfig(kind="jsonl", train="rows.jsonl", eval="rows.jsonl"), seed=0, recipe_dir=tmp_path)
    stories = build_task(FlawedStoriesConfig(), seed=0, recipe_dir=tmp_path)
    assert task_score(own) is None
    prompt = stories.prompt("train", 0, markers=False)
    assert task_score(stories)(prompt, rf"\boxed{{{prompt.columns['answer']}}}").value == 1.0
