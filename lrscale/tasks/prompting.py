r"""The words of the prompts: what is asked about a story, and the paragraph that tells of the marker.

Two styles. `paper` says in full what is wanted, for instruct models. `brief` says it in a handful
of words, for models whose vocabulary holds little more than the stories.
"""

from __future__ import annotations

from collections.abc import Iterable

from lrscale.config.task import PromptStyle
from lrscale.records import Prompt

MARKER_EXAMPLE = "<implicit_thought>n</implicit_thought>"
"""How prompts write the marker: with a letter for the number, so that the prompt itself starts no latent step."""

MARKER_PARAGRAPH = (
    "You have a second way of thinking, besides writing your thoughts down. In place of a sentence that you would "
    f"have written you may put {MARKER_EXAMPLE}, where n is a whole number from 1 to 5: you then think that sentence "
    "silently, in n steps. Take a small n for an easy thought and a large one for a hard thought. You may do this as "
    "often as you like; it serves best in the middle of your reasoning, between sentences that are written out."
)
"""Appended to `paper` prompts, and to any other task's prompts that shall know the marker."""

BRIEF_QUESTION = "Does the story contradict itself?"
BRIEF_MARKER_SENTENCE = f"You may write {MARKER_EXAMPLE}."

_PAPER_TASK = (
    "Below is a short story. Decide whether it holds a continuity error: something in it that cannot be, given what "
    "the story said before. A person may be in a place that they never went to, use what they do not have, act after "
    "their death or change in a way that people do not change. Things that are merely strange, or left unsaid, are no "
    "errors."
)
_PAPER_ANSWER = (
    "Go through the story in order and keep track of what holds after each sentence; write your reasoning down. Then "
    r"end with your final answer: \boxed{Yes} if the story holds a continuity error, \boxed{No} if it holds none."
)


def continuity_prompt(story: str, *, style: PromptStyle, markers: bool) -> str:
    """The question whether `story` holds a continuity error; `markers` tells of the marker as well."""
    if style == "brief":
        parts = [story, BRIEF_QUESTION, *([BRIEF_MARKER_SENTENCE] if markers else [])]
        return " ".join(parts)
    return "\n\n".join([_PAPER_TASK, f"Story:\n{story}", _PAPER_ANSWER, *([MARKER_PARAGRAPH] if markers else [])])


def marked(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The same prompts, each with the marker paragraph after it."""
    return [Prompt(p.prompt_id, with_marker_paragraph(p.text), p.columns) for p in prompts]


def with_marker_paragraph(prompt: str) -> str:
    """Any prompt with the marker paragraph after it."""
    return f"{prompt}\n\n{MARKER_PARAGRAPH}"
