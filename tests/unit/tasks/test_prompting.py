"""The words of the prompts."""

from __future__ import annotations

import re

import pytest

from lrscale.tasks.boxed import boxed_answer
from lrscale.tasks.prompting import MARKER_EXAMPLE, MARKER_PARAGRAPH, continuity_prompt, with_marker_paragraph

STORY = "1. Anna starts at the mill. 2. Anna sweeps the barn."


@pytest.mark.parametrize("style", ["paper", "brief"])
def test_only_marker_prompts_speak_of_the_marker(style: str) -> None:
    """Locks out arms that should never hear of markers being told of them, or the reverse."""
    plain = continuity_prompt(STORY, style=style, markers=False)
    told = continuity_prompt(STORY, style=style, markers=True)
    assert STORY in plain and "implicit_thought" not in plain
    assert told.startswith(plain) and told.count(MARKER_EXAMPLE) == 1


@pytest.mark.parametrize("text", [continuity_prompt(STORY, style="brief", markers=True), MARKER_PARAGRAPH])
def test_no_prompt_holds_a_marker_that_would_start_latent_steps(text: str) -> None:
    """Locks out a prompt whose example is itself a valid marker."""
    assert re.search(r"<implicit_thought>\s*\d", text) is None


def test_paper_prompt_asks_for_the_answer_in_a_box() -> None:
    """Locks out a task statement that leaves the form of the answer open."""
    text = continuity_prompt(STORY, style="paper", markers=False)
    assert r"\boxed{Yes}" in text and r"\boxed{No}" in text
    assert boxed_answer(text) is not None


def test_marker_paragraph_goes_behind_any_prompt() -> None:
    """Locks out the paragraph replacing or preceding a user's own prompt."""
    assert with_marker_paragraph("What is 2 + 2?") == f"What is 2 + 2?\n\n{MARKER_PARAGRAPH}"
