"""What scores samples inside a worker, and what it says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lrscale.records import Prompt, Score, ScoreFailed


class PassingError(Exception):
    """For reward functions: something is wrong that may be over soon, so the sample is to be tried again.

    ConnectionError and TimeoutError mean the same.
    """


@dataclass(frozen=True, slots=True)
class Sample:
    """What a reward may see of one completion."""

    prompt: Prompt
    completion: str
    completion_ids: tuple[int, ...]
    latent_steps: int = 0
    """Latent steps of the completion."""


@dataclass(frozen=True, slots=True)
class Passing:
    """A failure that may be over soon."""

    failure: ScoreFailed
    """What it comes to once there is no retry left."""
    retry_after_s: float = 0.0
    """The least wait that the service asked for."""


Result = Score | ScoreFailed | Passing


class Source(Protocol):
    """A loaded reward."""

    def needs(self) -> Needs:
        """What the data must have, found out once."""
        ...

    def score(self, samples: Sequence[Sample]) -> Sequence[Result]:
        """One result a sample, in order. May raise: then every sample of the call has failed."""
        ...


class SourceSpec(Protocol):
    """How a worker gets its source; travels to it pickled."""

    def open(self) -> Source:
        """Load it. ValueError, with what to do, where that cannot be done."""
        ...


@dataclass(frozen=True, slots=True)
class CallNeeds:
    """What one function needs of the data's columns."""

    origin: str
    """`file:line: name(signature)`, for messages."""
    own: frozenset[str]
    """Arguments that do not come from columns."""
    required: frozenset[str]


@dataclass(frozen=True, slots=True)
class Needs:
    """What the functions of a source need; empty where nothing is known."""

    calls: tuple[CallNeeds, ...] = ()

    def check(self, columns: Mapping[str, Any]) -> None:
        """Refuse data that a function cannot be called with; ValueError."""
        for call in self.calls:
            clash = sorted(call.own & columns.keys())
            if clash:
                raise ValueError(
                    f"reward: the data has a column {clash[0]!r}, which is also an argument of {call.origin}. "
                    "Rename the column."
                )
            missing = sorted(call.required - call.own - columns.keys())
            if missing:
                raise ValueError(
                    f"reward: {call.origin} needs {', '.join(missing)}; the data has the columns "
                    f"{', '.join(sorted(columns)) or '(none)'}. Add the column to the data, "
                    "or give the parameter a default value."
                )
