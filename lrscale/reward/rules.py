"""Rules that turn what was written into a Score: the task's own answer check, and what form and length add or cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lrscale.config.reward import FormatConfig, LengthPenaltyConfig, OverlongConfig
from lrscale.records import Prompt, Rollout, Score

TaskScore = Callable[[Prompt, str], Score]
"""A task's rule: the prompt and the completion's text give the Score. It may not fail."""


@dataclass(frozen=True, slots=True)
class Shaping:
    """The terms that every kind of reward may add."""

    length: LengthPenaltyConfig = field(default_factory=LengthPenaltyConfig)
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    format: FormatConfig = field(default_factory=FormatConfig)

    def apply(self, score: Score, rollout: Rollout, completion: str) -> Score:
        """The score with all terms, each of them in `parts`; they add up to the value.

        `parts["task"]` keeps the reward before them, so accuracy never depends on form or length.
        `parts["length"]` is always there; `overlong` and `format` where the recipe switches them on.
        """
        price = length_price(rollout, self.length) if score.value > 0.0 else 0.0
        terms = {"length": -price if price else 0.0}
        if self.overlong.limit:
            terms["overlong"] = overlong_term(rollout.length, self.overlong)
        if self.format.require:
            terms["format"] = self.format.bonus if holds_in_order(completion, self.format.require) else 0.0
        parts = {**score.parts, "task": score.value, **terms}
        return Score(value=score.value + sum(terms.values()), parts=parts)


def length_price(rollout: Rollout, penalty: LengthPenaltyConfig) -> float:
    """Reward that a right answer's length costs: discrete tokens plus weighted latent steps, per 100.

    A wrong answer pays nothing, or short wrong answers would be worth learning. There is no floor:
    a right answer that is dear enough goes below 0.
    """
    positions = len(rollout.completion_ids) + penalty.latent_weight * rollout.completion_latent_steps
    return penalty.price_per_100 * positions / 100.0


def overlong_term(positions: int, config: OverlongConfig) -> float:
    """0 up to the ramp, then falling to -penalty at the limit, and staying there (DAPO's soft punishment)."""
    over = positions - (config.limit - config.ramp)
    return -config.penalty * min(max(over / config.ramp, 0.0), 1.0) if over > 0 else 0.0


def holds_in_order(text: str, required: tuple[str, ...]) -> bool:
    """Whether the text holds all of these, each behind the one before it."""
    place = 0
    for wanted in required:
        found = text.find(wanted, place)
        if found < 0:
            return False
        place = found + len(wanted)
    return True
