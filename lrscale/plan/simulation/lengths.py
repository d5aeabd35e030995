"""How long sequences become: discrete tokens and latent steps, given as a distribution or taken from a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol


class Completion(NamedTuple):
    """The length of one completion."""

    tokens: int
    latent_steps: int

    @property
    def positions(self) -> int:
        """Positions it decodes: each costs a pass over the weights, latent or not."""
        return self.tokens + self.latent_steps


class Lengths(Protocol):
    """A distribution of completions."""

    @property
    def name(self) -> str:
        """For people: what was assumed, or where it was measured."""

    def draw(self, random: Random) -> Completion: ...


@dataclass(frozen=True, slots=True)
class FixedLengths:
    """All the same: the limit in which everything has a closed form."""

    tokens: int
    latent_steps: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.latent_steps < 0:
            raise ValueError(
                f"lengths: given {self.tokens} tokens and {self.latent_steps} latent steps, needed at least 1 and 0"
            )

    @property
    def name(self) -> str:
        return f"always {self.tokens} tokens and {self.latent_steps} latent steps"

    def draw(self, random: Random) -> Completion:
        return Completion(self.tokens, self.latent_steps)


@dataclass(frozen=True, slots=True)
class LognormalLengths:
    """Discrete tokens, log-normal and cut at the limit; many short ones and a long tail, as sampled traces are.

    With mean m and spread s of the logarithm, ln T is normal with mean ln m - s^2 / 2 and deviation s.
    """

    mean: float
    """Before the cut."""
    spread: float
    """Standard deviation of the logarithm; 0 makes them all the same."""
    limit: int
    """`rollout.max_new_tokens`."""
    latent_per_token: float = 0.0
    """Latent steps on top, in proportion."""

    def __post_init__(self) -> None:
        if not self.mean > 0 or not self.spread >= 0 or self.limit < 1 or not self.latent_per_token >= 0:
            raise ValueError(
                f"lengths: given mean {self.mean:g}, spread {self.spread:g}, limit {self.limit}; needed a mean above 0, "
                "a spread of at least 0 and a limit of at least 1"
            )

    @property
    def name(self) -> str:
        return f"log-normal, mean {self.mean:.0f} tokens, spread {self.spread:g}, at most {self.limit}"

    def draw(self, random: Random) -> Completion:
        drawn = random.lognormvariate(math.log(self.mean) - self.spread**2 / 2, self.spread)
        tokens = min(self.limit, max(1, round(drawn)))
        return Completion(tokens, round(tokens * self.latent_per_token))


@dataclass(frozen=True, slots=True)
class MeasuredLengths:
    """Completions of a run, drawn again with replacement."""

    seen: tuple[Completion, ...]
    source: str = "measured"

    def __post_init__(self) -> None:
        if not self.seen:
            raise ValueError(
                f"lengths: {self.source} holds no completion to draw from; give a run that has sampled some"
            )
        wrong = next((one for one in self.seen if one.tokens < 0 or one.latent_steps < 0 or not one.positions), None)
        if wrong is not None:
            raise ValueError(f"lengths: {self.source} holds a completion of {wrong.tokens} tokens, which cannot be")

    @property
    def name(self) -> str:
        return f"{len(self.seen)} completions of {self.source}"

    def draw(self, random: Random) -> Completion:
        return random.choice(self.seen)


@dataclass(frozen=True, slots=True)
class LatentForm:
    """What becomes of a discrete trace when a share of its sentences is thought in latents.

    LiteReason's traces (arXiv 2512.02240): of a replaced sentence of n tokens remain a marker and int(t_r n) latent steps, clamped to
    [1, max_steps].
    """

    share: float
    """Of the sentences; the recipe's `stages.traces.replace_ratios`, or what a policy has learned."""
    token_ratio: float
    """t_r."""
    max_steps: int
    sentence_tokens: float
    marker_tokens: int
    """Of <implicit_thought>N</implicit_thought>: 3 with `model.add_marker_tokens`, about 12 in ordinary pieces."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"latent share: given {self.share:g}, needed 0 to 1")
        if self.sentence_tokens <= 0 or self.token_ratio <= 0 or self.max_steps < 1 or self.marker_tokens < 1:
            raise ValueError("latent form: sentence, ratio, steps and marker have to be above 0")

    def of(self, discrete: Completion) -> Completion:
        """The same trace with latents. Sentences are all of the mean length."""
        replaced = self.share * discrete.tokens / self.sentence_tokens
        steps = min(self.max_steps, max(1, int(self.token_ratio * self.sentence_tokens)))
        tokens = discrete.tokens * (1.0 - self.share) + replaced * self.marker_tokens
        return Completion(max(1, round(tokens)), round(replaced * steps))


@dataclass(frozen=True, slots=True)
class LatentLengths:
    """Discrete lengths in their latent form."""

    discrete: Lengths
    form: LatentForm

    @property
    def name(self) -> str:
        return f"{self.discrete.name}; {100 * self.form.share:.0f} % of the sentences as latents"

    def draw(self, random: Random) -> Completion:
        return self.form.of(self.discrete.draw(random))


def mean_completion(lengths: Lengths, draws: int = 2000) -> tuple[float, float]:
    """Mean tokens and latent steps, over a fixed sample."""
    random = Random("mean")
    drawn: Sequence[Completion] = [lengths.draw(random) for _ in range(draws)]
    return sum(one.tokens for one in drawn) / draws, sum(one.latent_steps for one in drawn) / draws
