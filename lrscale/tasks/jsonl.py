r"""Bring your own prompts: one JSON object a line.

    {"prompt": "What is 2 + 2?", "answer": "4", "level": 1}

`prompt` is needed; `answer` is needed in all rows as soon as one has it; further keys are columns
(null in rows without them) and reach the reward function under their names. The reward is the user's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrscale.config.task import JsonlConfig
from lrscale.records import Prompt, Score
from lrscale.tasks.boxed import boxed_answer
from lrscale.tasks.prompting import marked, with_marker_paragraph
from lrscale.tasks.rows import Encode, RowProblems, length_problem, read_jsonl, text_problem
from lrscale.tasks.task import Split

_Rows = list[tuple[int, dict[str, Any]]]


class Jsonl:
    """The user's prompts; see `Task`. Both files are read and checked at once."""

    def __init__(self, config: JsonlConfig, *, recipe_dir: Path, encode: Encode | None = None) -> None:
        self.config = config
        problems = RowProblems()
        paths = {split: recipe_dir / Path(path).expanduser() for split, path in self._paths().items()}
        rows = {split: read_jsonl(path, f"task.{split}", problems, limit=config.limit) for split, path in paths.items()}
        everything = [row for split_rows in rows.values() for _, row in split_rows]
        self._has_answers = any("answer" in row for row in everything)
        for split, path in paths.items():
            self._check(path, rows[split], problems, encode)
        problems.raise_if_any("task.train, task.eval")
        columns = sorted({name for row in everything for name in row} - {"prompt"})
        # All rows get all columns, so that whether a reward function finds what it needs hangs on no single row.
        self._prompts = {
            split: [
                Prompt(f"{split}-{number:06d}", row["prompt"], {name: row.get(name) for name in columns})
                for number, row in split_rows
            ]
            for split, split_rows in rows.items()
        }
        self._asks_for_box = all(r"\boxed" in row["prompt"] for row in everything)

    def prompts(self, split: Split, *, markers: bool) -> list[Prompt]:
        """The rows of a file in order; `prompt_id` holds the line number."""
        prompts = self._prompts[split]
        return marked(prompts) if markers and self.config.marker_paragraph else list(prompts)

    def score(self, prompt: Prompt, completion: str) -> Score:
        """There is no rule: ValueError. `catalog.task_score` says so beforehand."""
        raise ValueError("the task jsonl has no answer rule of its own: set reward.kind: function and reward.path")

    def answered(self, completion: str) -> bool:
        r"""Whether there is a closed `\boxed{...}` where every prompt asks for one, else whether there is any text."""
        return boxed_answer(completion) is not None if self._asks_for_box else bool(completion.strip())

    def _paths(self) -> dict[Split, str]:
        return {"train": self.config.train, "eval": self.config.eval}

    def _check(self, path: Path, rows: _Rows, problems: RowProblems, encode: Encode | None) -> None:
        for number, row in rows:
            problem = self._row_problem(row, encode)
            if problem:
                problems.add(f"{path}:{number}", problem)

    def _row_problem(self, row: dict[str, Any], encode: Encode | None) -> str | None:
        if "prompt" not in row:
            return f"the key 'prompt' is missing (keys: {', '.join(row) or 'none'})"
        problem = text_problem(row["prompt"], "prompt")
        if problem is None and self._has_answers:
            if "answer" not in row:
                return "the key 'answer' is missing, which other rows have"
            answer = row["answer"]
            if answer is None or (isinstance(answer, str) and not answer.strip()):
                return "'answer' is empty"
        if problem:
            return problem
        text = row["prompt"]
        longest = with_marker_paragraph(text) if self.config.marker_paragraph else text
        limit = self.config.max_prompt_tokens
        return length_problem(longest, encode, limit, "task.max_prompt_tokens", without_markers=text)
