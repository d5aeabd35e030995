r"""Next chapter: reason about what comes next in a story (VR-CLI, arXiv 2503.22828).

One chapter a line, in any order of stories, the chapters of a story numbered from 1 on without a gap:

    {"story": "Snow-man", "section": 1, "text": "It is so delightfully cold ..."}

Chapter k + 1 is foreseen from chapters 1 to k. Its text reaches the reward as the column `next_chapter` and is never
part of a prompt; `lrscale.reward.vr_cli` scores by it.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from lrscale.config.task import NextChapterConfig
from lrscale.records import Prompt, Score
from lrscale.tasks.prompting import marked, with_marker_paragraph
from lrscale.tasks.rows import Encode, RowProblems, length_problem, read_jsonl, text_problem
from lrscale.tasks.task import Split

_TASK = (
    "Below is a story up to a certain point. Think about how it goes on: who will do what in the part that comes next, "
    "what it will bring to light, and in what tone it will be told. Reason from what the story has set up. Then say in a "
    "few sentences what you expect to happen."
)
_Story = dict[int, tuple[str, str]]
"""Section number to (place, text)."""


class NextChapter:
    """Chapters of the user's stories; see `Task`. Both files are read and checked at once."""

    def __init__(self, config: NextChapterConfig, *, recipe_dir: Path, encode: Encode | None = None) -> None:
        self.config = config
        problems = RowProblems()
        files: dict[Split, str] = {"train": config.train, "eval": config.eval}
        stories = {
            split: _stories(recipe_dir / Path(path).expanduser(), f"task.{split}", problems)
            for split, path in files.items()
        }
        for name, story in stories["eval"].items():
            if name in stories["train"]:
                problems.add(story[min(story)][0], f"the story {name!r} is in task.train as well")
        self._prompts = {split: self._datapoints(split, found, problems, encode) for split, found in stories.items()}
        problems.raise_if_any("task.train, task.eval")

    def prompts(self, split: Split, *, markers: bool) -> list[Prompt]:
        """A prompt for every chapter but the first of each story, in the order of the file."""
        prompts = self._prompts[split]
        return marked(prompts) if markers and self.config.marker_paragraph else list(prompts)

    def score(self, prompt: Prompt, completion: str) -> Score:
        """There is no rule: ValueError. `catalog.task_score` says so beforehand."""
        raise ValueError("the task next_chapter has no rule of its own: set reward.kind: vr_cli and reward.path")

    def answered(self, completion: str) -> bool:
        """Whether anything was said."""
        return bool(completion.strip())

    def _datapoints(
        self, split: Split, stories: dict[str, _Story], problems: RowProblems, encode: Encode | None
    ) -> list[Prompt]:
        prompts = []
        for number, (name, story) in enumerate(stories.items(), start=1):
            if sorted(story) != list(range(1, len(story) + 1)):
                place = story[min(story)][0]
                problems.add(
                    place, f"the story {name!r} has the sections {sorted(story)}, needed 1, 2, 3 ... without a gap"
                )
                continue
            for section in range(2, len(story) + 1):
                first = max(1, section - self.config.context_sections) if self.config.context_sections else 1
                so_far = "\n\n".join(story[k][1] for k in range(first, section))
                columns = {"story": name, "section": section, "story_so_far": so_far, "next_chapter": story[section][1]}
                prompt = Prompt(
                    f"{split}-{number:05d}-{section:03d}", f"{_TASK}\n\nThe story so far:\n\n{so_far}", columns
                )
                prompts.append(prompt)
                self._check_length(prompt, story[section][0], problems, encode)
        return prompts

    def _check_length(self, prompt: Prompt, place: str, problems: RowProblems, encode: Encode | None) -> None:
        longest = with_marker_paragraph(prompt.text) if self.config.marker_paragraph else prompt.text
        limit = self.config.max_prompt_tokens
        problem = length_problem(longest, encode, limit, "task.max_prompt_tokens", without_markers=prompt.text)
        if problem:
            problems.add(place, f"{problem}; task.context_sections shows fewer chapters")


def _stories(path: Path, key: str, problems: RowProblems) -> dict[str, _Story]:
    stories: dict[str, _Story] = defaultdict(dict)
    for number, row in read_jsonl(path, key, problems):
        place = f"{path}:{number}"
        problem = _row_problem(row)
        if problem is None and row["section"] in stories[row["story"]]:
            problem = f"section {row['section']} of {row['story']!r} is there more than once"
        if problem:
            problems.add(place, problem)
            continue
        stories[row["story"]][row["section"]] = (place, row["text"])
    return {name: story for name, story in stories.items() if story}


def _row_problem(row: dict[str, Any]) -> str | None:
    for name in ("story", "section", "text"):
        if name not in row:
            return f"the key {name!r} is missing (keys: {', '.join(row) or 'none'})"
    section = row["section"]
    if isinstance(section, bool) or not isinstance(section, int) or section < 1:
        return f"'section' is {section!r}, needed a whole number from 1 on"
    return text_problem(row["story"], "story") or text_problem(row["text"], "text")
