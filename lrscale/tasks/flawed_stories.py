r"""Flawed stories: generated short stories with exact state tracking, some with one planted continuity error.

Unlimited and seeded: story i of a split is a function of the recipe's section, the seed, the split
and i. The hash of a story's text decides to which split it may belong, so no text is ever in both,
whatever the seeds and sizes: a model trained on `train` stories of one seed has never met an `eval`
story of another.
"""

from __future__ import annotations

import hashlib
import itertools
import random

from lrscale.config.task import FlawedStoriesConfig
from lrscale.records import Prompt, Score
from lrscale.tasks.boxed import yes_or_no
from lrscale.tasks.prompting import continuity_prompt
from lrscale.tasks.ring import SETTING as RING_SETTING
from lrscale.tasks.ring import ring_story
from lrscale.tasks.story import Story
from lrscale.tasks.task import Split
from lrscale.tasks.village import village_story

_EVAL_BUCKETS = 8
"""One story text in this many belongs to the eval split."""


class FlawedStories:
    """The generated task (method, section 7); see `Task`."""

    def __init__(self, config: FlawedStoriesConfig, *, seed: int) -> None:
        self.config = config
        self.seed = seed

    def story(self, split: Split, index: int) -> Story:
        """Story `index` of a split; any index from 0 on, also past the recipe's number of prompts."""
        for attempt in itertools.count():
            story = self._draw(random.Random(f"{self.seed}/{split}/{index}/{attempt}"))
            if split_of(story.text) == split:
                return story
        raise AssertionError("unreachable")

    def prompt(self, split: Split, index: int, *, markers: bool) -> Prompt:
        """Prompt `index` of a split, with the marker paragraph or without."""
        story = self.story(split, index)
        columns = {
            "answer": story.answer,
            "explanation": story.explanation,
            "events": list(story.sentences),
            "world": self.config.world,
        }
        # A brief prompt leaves out the rules of the ring: models that read it have learned them by heart.
        rules = self.config.world == "ring" and self.config.prompt_style == "paper"
        text = f"{RING_SETTING} {story.text}" if rules else story.text
        asked = continuity_prompt(text, style=self.config.prompt_style, markers=markers)
        return Prompt(f"{split}-{index:06d}", asked, columns)

    def prompts(self, split: Split, *, markers: bool) -> list[Prompt]:
        """As many prompts as the recipe asks for."""
        count = self.config.train_prompts if split == "train" else self.config.eval_prompts
        return [self.prompt(split, index, markers=markers) for index in range(count)]

    def reference_trace(self, index: int, split: Split = "train") -> str:
        r"""The exact explicit reasoning for a story, up to the first conflict, with its `\boxed{}` answer."""
        return traced(self.story(split, index))

    def score(self, prompt: Prompt, completion: str) -> Score:
        r"""1 where the boxed answer is right; 0 where it is wrong, malformed or missing."""
        return Score(float(yes_or_no(completion) == prompt.columns["answer"]))

    def answered(self, completion: str) -> bool:
        """Whether the completion ends in a boxed Yes or No."""
        return yes_or_no(completion) is not None

    def _draw(self, rng: random.Random) -> Story:
        config = self.config
        if config.world == "ring":
            return ring_story(rng, events=config.events, flawed_share=config.flawed_share)
        return village_story(rng, events=config.events, characters=config.characters, flawed_share=config.flawed_share)


def split_of(text: str) -> Split:
    """The split that a story's text belongs to, by its hash alone."""
    return "eval" if hashlib.sha256(text.encode()).digest()[0] % _EVAL_BUCKETS == 0 else "train"


def traced(story: Story) -> str:
    r"""A story's reference reasoning as one text, ending in `\boxed{Yes}` or `\boxed{No}`."""
    return " ".join([*story.trace, rf"\boxed{{{story.answer}}}"])
