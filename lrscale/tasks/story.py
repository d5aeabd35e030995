"""What every world of flawed stories hands out: the events, their text, and the exact reference trace."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a story tells. Fields that the kind has no use for are None."""

    kind: str
    actor: str
    other: str | None = None
    """The second person: whom the actor follows, gives to or takes from."""
    place: str | None = None
    thing: str | None = None
    colour: str | None = None
    step: str | None = None
    """`ring` only: how the walker moves (`one`, `two`, `three`, `bridge`, `ferry`)."""


@dataclass(frozen=True, slots=True)
class Story:
    """A story with the whole truth about it."""

    events: tuple[Event, ...]
    """One a sentence, in order."""
    sentences: tuple[str, ...]
    trace: tuple[str, ...]
    """Reference reasoning, one sentence an event, with the state after it; ends at the first conflict."""
    flaw: int | None
    """Index of the sentence that contradicts what came before; None where the story is sound."""
    explanation: str

    @property
    def text(self) -> str:
        """The story as one paragraph."""
        return " ".join(self.sentences)

    @property
    def answer(self) -> str:
        """`Yes` where the story holds a continuity error, else `No`."""
        return "No" if self.flaw is None else "Yes"


def explain(flaw: int | None, truth: str) -> str:
    """One sentence for people: which sentence is wrong, and what is true instead."""
    if flaw is None:
        return "Every sentence agrees with what came before it."
    return f"Sentence {flaw + 1} does not agree with what came before it: {truth}."
