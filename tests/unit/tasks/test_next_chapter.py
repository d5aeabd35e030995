"""Next chapter: datapoints from chapters, the gold text kept out of the prompt, broken files told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lrscale.config.task import NextChapterConfig
from lrscale.tasks.next_chapter import NextChapter

FOX = ["The fox found a key.", "He tried it on every door.", "The last one opened."]


def rows(story: str, texts: list[str], first: int = 1) -> list[dict[str, Any]]:
    return [{"story": story, "section": first + k, "text": text, "origin": "x"} for k, text in enumerate(texts)]


def task(
    folder: Path, train: list[dict], evaluation: list[dict] | None = None, encode=None, **config: Any
) -> NextChapter:
    evaluation = evaluation or rows("owl", ["One.", "Two."])
    for name, content in (("train", train), ("eval", evaluation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    whole = NextChapterConfig(kind="next_chapter", train="train.jsonl", eval="eval.jsonl", **config)
    return NextChapter(whole, recipe_dir=folder, encode=encode)


def test_every_chapter_but_the_first_is_foreseen_and_never_shown(tmp_path: Path) -> None:
    """A prompt that holds the gold chapter teaches copying."""
    mixed = [*rows("fox", FOX)[::-1], *rows("hen", ["A hen.", "Her egg."])]
    first, second, third = task(tmp_path, mixed).prompts("train", markers=False)
    assert first.columns["story_so_far"] == FOX[0] and first.columns["next_chapter"] == FOX[1]
    assert second.columns["story_so_far"] == f"{FOX[0]}\n\n{FOX[1]}" and third.columns["next_chapter"] == "Her egg."
    assert FOX[0] in first.text and FOX[1] not in first.text and FOX[2] not in second.text
    assert len({prompt.prompt_id for prompt in (first, second, third)}) == 3
    assert "implicit_thought" not in first.text
    assert "implicit_thought" in task(tmp_path, mixed).prompts("train", markers=True)[0].text


def test_the_last_chapters_alone(tmp_path: Path) -> None:
    prompts = task(tmp_path, rows("fox", FOX), context_sections=1).prompts("train", markers=False)
    assert [prompt.columns["story_so_far"] for prompt in prompts] == FOX[:2]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([{"story": "fox", "text": "x"}], r"train.jsonl:1: the key 'section' is missing"),
        ([{"story": "fox", "section": "1", "text": "x"}], "'section' is '1'"),
        ([{"story": "fox", "section": 1, "text": " "}], "'text' is empty"),
        (
            [*rows("fox", FOX), *rows("fox", ["again"], first=2)],
            r"train.jsonl:4: section 2 of 'fox' is there more than",
        ),
        (rows("fox", FOX, first=2), r"has the sections \[2, 3, 4\], needed 1, 2, 3"),
        (rows("owl", FOX), r"eval.jsonl:1: the story 'owl' is in task.train as well"),
    ],
)
def test_broken_rows_are_told_with_their_place(tmp_path: Path, train: list[dict], words: str) -> None:
    """The story in both files is the one that makes held-out figures a lie."""
    with pytest.raises(ValueError, match=words):
        task(tmp_path, train)


def test_prompts_that_are_too_long_name_the_chapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.jsonl:3: the prompt has .*context_sections"):
        task(tmp_path, rows("fox", [FOX[0], FOX[1] * 20, FOX[2]]), encode=str.split, max_prompt_tokens=180)
