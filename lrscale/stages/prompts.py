"""The task's prompts as a stage needs them: drawn once, found by id, encoded for the policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from lrscale.latent import LatentPolicy
from lrscale.records import Prompt
from lrscale.tasks.task import Split, Task


class PromptBook:
    """Caches what the task generates or reads; prompts of a split keep their order."""

    def __init__(self, task: Task, policy: LatentPolicy, *, chat_template: bool) -> None:
        self.task = task
        self._policy = policy
        self._chat_template = chat_template
        self._prompts: dict[tuple[Split, bool], Sequence[Prompt]] = {}
        self._ids: dict[str, tuple[int, ...]] = {}

    def prompts(self, split: Split, *, markers: bool) -> Sequence[Prompt]:
        """All prompts of a split; ValueError where there is none."""
        key = (split, markers)
        if key not in self._prompts:
            self._prompts[key] = self.task.prompts(split, markers=markers)
            if not self._prompts[key]:
                raise ValueError(f"task: the {split} split has no prompts; give the task at least one")
        return self._prompts[key]

    @cached_property
    def _train_with_markers(self) -> dict[str, Prompt]:
        return {prompt.prompt_id: prompt for prompt in self.prompts("train", markers=True)}

    def with_markers(self, prompt_id: str) -> Prompt:
        """The training prompt of that id, marker paragraph included."""
        found = self._train_with_markers.get(prompt_id)
        if found is None:
            raise ValueError(
                f"traces name the training prompt {prompt_id!r}, which the task does not have (any more). "
                "The data changed since the traces were sampled: start a new run"
            )
        return found

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt."""
        if prompt.text not in self._ids:
            self._ids[prompt.text] = tuple(self._policy.encode(prompt.text, chat_template=self._chat_template))
        return self._ids[prompt.text]
