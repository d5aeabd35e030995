"""What is said about a bad recipe: every problem at once, each with its place and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: a line of a file, or an option of the command line."""

    source: str
    line: int = 0
    """1-based; 0 where the source has no lines (`--set`)."""
    note: str = ""
    """What to say behind the key, such as "overridden by --nodes"."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a recipe."""

    place: Place
    key: str
    """Dotted key, empty where the file as a whole is meant."""
    message: str
    """What was given and what is allowed, in one line."""
    help: str = ""

    def __str__(self) -> str:
        note = f" ({self.place.note})" if self.place.note else ""
        lines = [f"error: {self.message}", f"  {self.place} {self.key}{note}".rstrip()]
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)


class RecipeError(ValueError):
    """A recipe that cannot be used; `problems` holds everything that was found, never just the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeNotFoundError(RecipeError):
    """A recipe was named that is neither a file nor one of those shipped."""
