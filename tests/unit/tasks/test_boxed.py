"""The final answer is read from the last closed box, whatever stands around it."""

from __future__ import annotations

import pytest

from lrscale.tasks.boxed import boxed_answer, yes_or_no


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{Yes}", "Yes"),
        (r"\boxed{Yes} no wait \boxed{No}", "No"),
        (r"\boxed{No} then cut off \boxed{Ye", "No"),
        (r"\boxed{\text{Yes}}", r"\text{Yes}"),
        (r"\boxed{ 12 }", "12"),
        (r"\boxed{}", ""),
        (r"\boxed{{}", None),
        ("Yes", None),
        ("", None),
    ],
)
def test_last_closed_box_wins(text: str, answer: str | None) -> None:
    """Locks out reading the first box, a box cut by the length limit, or stopping at an inner brace."""
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{yes}", "Yes"),
        (r"\boxed{NO.}", "No"),
        (r"\boxed{\text{Yes}}", "Yes"),
        (r"\boxed{Yes, it does}", None),
        (r"\boxed{Yes/No}", None),
        ("No", None),
    ],
)
def test_yes_or_no_takes_nothing_else(text: str, answer: str | None) -> None:
    """Locks out credit for hedged or unboxed answers."""
    assert yes_or_no(text) == answer
