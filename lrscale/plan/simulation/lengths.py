"""How long each sequence becomes: discrete tokens and latent steps, drawn from an assumption or from a run."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, Protocol

from lrscale.plan.lengths import Lengths


class Completion(NamedTuple):
    """The length of one completion."""

    tokens: int
    latent_steps: int

    @property
    def positions(self) -> int:
        """What it decodes: each position costs a pass over the weights, latent or not."""
        return self.tokens + self.latent_steps


class LengthSource(Protocol):
    """A distribution of completions."""

    @property
    def name(self) -> str:
        """For people: what was assumed, or where it was measured."""

    def draw(self, random: Random) -> Completion: ...


@dataclass(frozen=True, slots=True)
class AssumedLengths:
    """The plan's log-normal positions, of which each completion has the same share of latents."""

    lengths: Lengths
    latent_share: float = 0.0
    _median: float = field(init=False)

    def __post_init__(self) -> None:
        mean, spread, longest = self.lengths.mean, self.lengths.spread, self.lengths.longest
        if not mean > 0 or not spread >= 0 or longest < 1 or not 0 <= self.latent_share < 1:
            raise ValueError(
                f"lengths: given mean {mean:g}, spread {spread:g}, limit {longest}, share of latents "
                f"{self.latent_share:g}; needed a mean above 0, a spread of at least 0, a limit of at least 1 and a share "
                "of 0 up to 1"
            )
        object.__setattr__(self, "_median", self.lengths.median)

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of lengths, before the cut."""
        return self.lengths.spread

    @property
    def name(self) -> str:
        lengths, latents = self.lengths, f", {100 * self.latent_share:.0f} % latents" if self.latent_share else ""
        return f"log-normal (mean {lengths.mean:.0f}, spread {lengths.spread:g}, at most {lengths.longest}{latents})"

    def draw(self, random: Random) -> Completion:
        drawn = self._median * math.exp(random.gauss(0.0, self.lengths.spread)) if self.lengths.spread else self._median
        positions = min(self.lengths.longest, max(1, round(drawn)))
        latents = round(positions * self.latent_share)
        return Completion(positions - latents, latents)


@dataclass(frozen=True, slots=True)
class MeasuredLengths:
    """Completions of a run, drawn again with replacement, and cut at `limit` positions."""

    seen: tuple[Completion, ...]
    source: str = "a run"
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.seen:
            raise ValueError(f"lengths: {self.source} holds no completion to draw from; give one that has sampled some")
        wrong = next((one for one in self.seen if min(one) < 0 or not one.positions), None)
        if wrong is not None:
            raise ValueError(
                f"lengths: {self.source} holds a completion of {wrong.tokens} tokens and {wrong.latent_steps} latent "
                "steps, which cannot be"
            )

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of lengths."""
        return statistics.pstdev(math.log(one.positions) for one in self.seen)

    @property
    def name(self) -> str:
        return f"{len(self.seen)} completions of {self.source}"

    def draw(self, random: Random) -> Completion:
        drawn = random.choice(self.seen)
        if self.limit is None or drawn.positions <= self.limit:
            return drawn
        latents = round(self.limit * drawn.latent_steps / drawn.positions)
        return Completion(self.limit - latents, latents)


@dataclass(frozen=True, slots=True)
class LatentForm:
    """What a latent step stands for, by the way LiteReason makes its traces (arXiv 2512.02240).

    Of a replaced sentence of n tokens remain a marker and N = int(t_r n) latent steps, clamped to [1, max_steps].
    """

    token_ratio: float
    """t_r."""
    max_steps: int
    sentence_tokens: float
    marker_tokens: int
    """Of <implicit_thought>N</implicit_thought>."""

    def __post_init__(self) -> None:
        if self.sentence_tokens <= 0 or self.token_ratio <= 0 or self.max_steps < 1 or self.marker_tokens < 0:
            raise ValueError("latent form: sentence, ratio and steps have to be above 0, the marker's tokens not below")

    @property
    def steps(self) -> int:
        """N of a sentence of the mean length."""
        return min(self.max_steps, max(1, int(self.token_ratio * self.sentence_tokens)))

    @property
    def saved_tokens(self) -> float:
        """Tokens that a latent step saves: those of its share of a sentence, less those of its marker."""
        return (self.sentence_tokens - self.marker_tokens) / self.steps

    def in_words(self, completion: Completion) -> Completion:
        """The same reasoning with every latent written out."""
        return Completion(max(1, round(completion.tokens + self.saved_tokens * completion.latent_steps)), 0)

    def in_latents(self, completion: Completion, share: float) -> Completion:
        """The same reasoning with a share of its sentences, all of the mean length, as latents."""
        steps = share * completion.tokens / self.sentence_tokens * self.steps
        return Completion(max(1, round(completion.tokens - self.saved_tokens * steps)), round(steps))


@dataclass(frozen=True, slots=True)
class InWords:
    """Completions with their latents written out, cut at the limit."""

    latent: LengthSource
    form: LatentForm
    limit: int

    @property
    def name(self) -> str:
        return f"{self.latent.name}, every latent step written out as {self.form.saved_tokens:.1f} tokens"

    def draw(self, random: Random) -> Completion:
        tokens = self.form.in_words(self.latent.draw(random)).tokens
        return Completion(min(tokens, self.limit), 0)


@dataclass(frozen=True, slots=True)
class InLatents:
    """Discrete completions with a share of their sentences as latents."""

    discrete: LengthSource
    form: LatentForm
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share of sentences thought in latents: given {self.share:g}, needed 0 to 1")

    @property
    def name(self) -> str:
        return f"{self.discrete.name}, {100 * self.share:.0f} % of the sentences as latents"

    def draw(self, random: Random) -> Completion:
        return self.form.in_latents(self.discrete.draw(random), self.share)


def mean_completion(lengths: LengthSource, draws: int = 2000) -> tuple[float, float]:
    """Mean tokens and latent steps, over a fixed sample."""
    random = Random("mean")
    drawn = [lengths.draw(random) for _ in range(draws)]
    return sum(one.tokens for one in drawn) / draws, sum(one.latent_steps for one in drawn) / draws
