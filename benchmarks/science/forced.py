"""Markers forced upon the policy: whole stories in latent steps, no choice left but the answer.

The prompt goes on with markers for every sentence of the trace, so all that the policy writes is its answer, from
latents alone. With latents of other rows, or none, nothing about the story's course is left: chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrscale.config.task import FlawedStoriesConfig
from lrscale.latent import LatentMode, LatentPolicy
from lrscale.tasks.flawed_stories import FlawedStories

STEPS_PER_SENTENCE = 2
MAX_NEW_TOKENS = 16
"""Room for the answer, and for a policy that goes on reasoning in words: that counts as what it is."""


@dataclass(frozen=True, slots=True)
class Forced:
    """What came of it."""

    accuracy: float
    answered: float
    """Share of completions that are an answer at all."""


def forced_accuracy(
    policy: LatentPolicy,
    mode: LatentMode,
    *,
    stories: int,
    seed: int,
    sentences_per_marker: int = 4,
) -> Forced:
    """Sampled at temperature 1, on stories of the eval split of `seed`."""
    task = FlawedStories(FlawedStoriesConfig(world="ring", events=(6, 8), prompt_style="brief"), seed=seed)
    prompts = [task.prompt("eval", index, markers=True) for index in range(stories)]
    rows = [
        [
            *policy.encode(prompt.text),
            *markers(policy, len(prompt.columns["events"]), sentences_per_marker),
        ]
        for prompt in prompts
    ]
    rollouts = policy.generate(rows, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=seed, mode=mode)
    texts = [policy.tokenizer.decode(rollout.completion_ids) for rollout in rollouts]
    right = [task.score(prompt, text).value for prompt, text in zip(prompts, texts, strict=True)]
    return Forced(sum(right) / stories, sum(map(task.answered, texts)) / stories)


def markers(policy: LatentPolicy, sentences: int, sentences_per_marker: int) -> Sequence[int]:
    """Ids of markers that stand for so many sentences, each for as many as it may."""
    ids: list[int] = []
    for first in range(0, sentences, sentences_per_marker):
        run = min(sentences_per_marker, sentences - first)
        ids += policy.detector.marker_ids(STEPS_PER_SENTENCE * run)
    return ids
