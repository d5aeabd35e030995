"""What the policy is asked: one section a task, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lrscale.config.base import NonNegativeInt, PositiveInt, Section, Share

PromptStyle = Literal["paper", "brief"]
"""`paper`: the full instructions; `brief`: one line, for models with small vocabularies."""


class FlawedStoriesConfig(Section):
    """Generated stories with exact state tracking; half hold one planted continuity error."""

    kind: Literal["flawed_stories"] = "flawed_stories"
    world: Literal["ring", "village"] = "village"
    """`ring`: one walker on a ring of places (the tiny demo); `village`: places, possessions, life and looks."""
    events: tuple[PositiveInt, PositiveInt] = (6, 12)
    """Fewest and most events a story."""
    characters: PositiveInt = 3
    flawed_share: Share = 0.5
    prompt_style: PromptStyle = "paper"
    train_prompts: PositiveInt = 4096
    eval_prompts: PositiveInt = 512

    @model_validator(mode="after")
    def _events_in_order(self) -> FlawedStoriesConfig:
        if self.events[0] > self.events[1]:
            raise ValueError(f"events: fewest ({self.events[0]}) is more than most ({self.events[1]})")
        return self


class FlawedFictionsConfig(Section):
    """The Flawed Fictions benchmark: columns `story` and `cont_error`, split 70/15/15 with seed 42."""

    kind: Literal["flawed_fictions"]
    path: str = "kahuja/flawed-fictions"
    """Hub id or a local path that the datasets library can load."""
    prompt_style: PromptStyle = "paper"
    max_prompt_tokens: PositiveInt = 8192


class JsonlConfig(Section):
    """Bring your own: one JSON object a line with at least `prompt`."""

    kind: Literal["jsonl"]
    train: str
    """Path of the training file, relative to the recipe."""
    eval: str
    """Path of the evaluation file, relative to the recipe."""
    marker_paragraph: bool = True
    """Append the paragraph that tells the model of the marker (latent arms only)."""
    max_prompt_tokens: PositiveInt = 8192
    limit: NonNegativeInt = 0
    """Read at most this many rows of each file; 0 reads all."""


class NextChapterConfig(Section):
    """Foresee the next chapter of stories (VR-CLI): one chapter a line, {"story", "section", "text"}."""

    kind: Literal["next_chapter"]
    train: str
    """Path of the training file, relative to the recipe. Stories stay whole: no story may be in both files."""
    eval: str
    """Path of the evaluation file, relative to the recipe."""
    context_sections: NonNegativeInt = 0
    """The last so many chapters are shown as the story so far; 0 shows all."""
    marker_paragraph: bool = True
    """Append the paragraph that tells the model of the marker (latent arms only)."""
    max_prompt_tokens: PositiveInt = 8192


TaskConfig = Annotated[
    FlawedStoriesConfig | FlawedFictionsConfig | JsonlConfig | NextChapterConfig, Field(discriminator="kind")
]
