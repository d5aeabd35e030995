"""The one shape every task has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from lrscale.records import Prompt, Score

Split = Literal["train", "eval"]


class Task(Protocol):
    """A source of prompts that can also tell a right answer from a wrong one."""

    def prompts(self, split: Split, *, markers: bool) -> Sequence[Prompt]:
        """All prompts of a split, in a fixed order; `markers` adds the paragraph that tells of the marker."""
        ...

    def score(self, prompt: Prompt, completion: str) -> Score:
        """The task's own reward of a completion's text (jsonl has none: there a user's function decides)."""
        ...

    def answered(self, completion: str) -> bool:
        """Whether the completion holds a final answer of the form the task asks for."""
        ...
