"""Rules that turn what was written into a Score: the task's own answer check, and a price on length."""

from __future__ import annotations

from collections.abc import Callable

from lrscale.config.rollout import LengthPenaltyConfig
from lrscale.records import Prompt, Rollout, Score

TaskScore = Callable[[Prompt, str], Score]
"""A task's rule: the prompt and the completion's text give the Score. It may not fail."""


def length_price(rollout: Rollout, penalty: LengthPenaltyConfig) -> float:
    """Reward that the completion's length costs: discrete tokens plus weighted latent steps, per 100."""
    positions = len(rollout.completion_ids) + penalty.latent_weight * rollout.completion_latent_steps
    return penalty.price_per_100 * positions / 100.0


def with_length_price(score: Score, rollout: Rollout, penalty: LengthPenaltyConfig) -> Score:
    """The score with the price of length taken off a right answer (value above 0).

    A wrong answer pays nothing, or short wrong answers would be worth learning. There is no floor:
    a right answer that is dear enough goes below 0. `parts["task"]` keeps the reward before the
    price, so accuracy never depends on length; `parts["length"]` is what was added (0 or less).
    """
    price = length_price(rollout, penalty) if score.value > 0.0 else 0.0
    length_part = -price if price else 0.0
    parts = {**score.parts, "task": score.value, "length": length_part}
    return Score(value=score.value + length_part, parts=parts)
