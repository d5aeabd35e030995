"""Whether the prompts fit the model, asked before the first stage: RL must not be the one to find out, hours later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lrscale.records import Prompt
from lrscale.stages import rl, traces
from lrscale.stages.parts import Parts
from lrscale.stages.projector_sft import STAGE as PROJECTOR_SFT
from lrscale.stages.randomness import take_cyclic
from lrscale.stages.sampling import ARMS

ENCODED_PROMPTS = 256
"""Of each kind the longest in characters, encoded: hardly any prompt outside of them is the longest in tokens."""


def check_lengths(parts: Parts) -> None:
    """The longest prompt of each kind that the run will use, with rollout.max_new_tokens behind it.

    Raises:
        ValueError: it takes more positions than the model has; names the prompt.
    """
    for kind, prompts in _used(parts):
        longest = sorted(prompts, key=lambda prompt: -len(prompt.text))[:ENCODED_PROMPTS]
        positions, prompt = max(((_positions(parts, prompt), prompt) for prompt in longest), key=lambda pair: pair[0])
        try:
            parts.policy.backbone.check_positions(positions + parts.recipe.rollout.max_new_tokens)
        except ValueError as error:
            raise ValueError(
                f"{kind} prompt {prompt.prompt_id} takes {positions} positions, and rollout.max_new_tokens is "
                f"{parts.recipe.rollout.max_new_tokens}: {error}"
            ) from error


def _used(parts: Parts) -> Iterator[tuple[str, Sequence[Prompt]]]:
    """Prompts by kind, as the stages draw them; a kind may come more than once, its ids are cached."""
    recipe, book = parts.recipe, parts.book
    if traces.STAGE in recipe.stages.run:
        chosen = traces.chosen_prompts(parts)
        yield "training", chosen
        if PROJECTOR_SFT in recipe.stages.run:
            yield "training (with the marker paragraph)", [book.with_markers(prompt.prompt_id) for prompt in chosen]
    for markers in sorted({ARMS[arm].markers for arm in recipe.stages.rl.arms}):
        if rl.STAGE in recipe.stages.run and recipe.stages.rl.steps:
            pool = book.prompts("train", markers=markers)
            count = min(recipe.stages.rl.steps * recipe.stages.rl.prompts_per_step, len(pool))
            yield "training", take_cyclic(pool, 0, count, recipe.seed, rl.STAGE)
        if "evaluate" in recipe.stages.run:
            yield "held-out", book.prompts("eval", markers=markers)[: recipe.stages.evaluate.prompts]


def _positions(parts: Parts, prompt: Prompt) -> int:
    ids = parts.book.ids(prompt)
    return len(ids) + sum(span.steps for span in parts.policy.detector.find(ids))
