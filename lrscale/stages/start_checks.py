"""What only the data and the model can tell about a recipe, said when a run starts: prompts there are, projector there is."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lrscale.config.recipe import Recipe
from lrscale.config.task import FlawedStoriesConfig, JsonlConfig
from lrscale.latent import LatentPolicy
from lrscale.latent.hf_layout import ProjectorFields
from lrscale.stages.prompts import PromptBook
from lrscale.stages.run_log import logger
from lrscale.stages.sampling import ARMS
from lrscale.tasks.task import Split


def check_prompt_counts(recipe: Recipe, book: PromptBook, stages: Collection[str]) -> None:
    """Warns where one of `stages` asks for more prompts than there are, since all there are is then used.

    Raises:
        ValueError: an RL step asks for more. A prompt would come twice in it, with two baselines of its own.
    """
    if isinstance(recipe.task, FlawedStoriesConfig):
        return  # makes as many as its recipe says, which config/checks.py has looked at
    wanted: list[tuple[str, str, Split, int]] = [
        ("traces", "stages.traces.prompts", "train", recipe.stages.traces.prompts),
        ("evaluate", "stages.evaluate.prompts", "eval", recipe.stages.evaluate.prompts),
        ("rl", "stages.rl.prompts_per_step", "train", recipe.stages.rl.prompts_per_step),
    ]
    for stage, key, split, count in wanted:
        there = len(book.prompts(split, markers=False)) if stage in stages else count
        if count <= there or (stage == "rl" and not recipe.stages.rl.steps):
            continue
        asked = f"{key} asks for {count}, {_source(recipe, split)} has {there}"
        if stage == "rl":
            raise ValueError(f"{asked}: prompts would repeat within a step. Give at most {there}, or add prompts")
        logger.warning("%s: all %d are used", asked, there)


def warn_of_untrained_projector(recipe: Recipe, policy: LatentPolicy) -> None:
    """Warns where arms think with a projector that nothing has trained: a clone of the last MLP."""
    stages = recipe.stages
    arms = [arm for arm in stages.rl.arms if ARMS[arm].markers and ARMS[arm].mode != "zero"]
    uses_latents = arms and ("rl" in stages.run or "evaluate" in stages.run)
    if uses_latents and "projector_sft" not in stages.run and ProjectorFields.read(policy.model.config) is None:
        logger.warning(
            "the projector is untrained: stages.run leaves projector_sft out and model.path %s brings no trained one, "
            "so the latents of %s say nothing. Add traces and projector_sft to stages.run, or start from a LiteReason "
            "checkpoint",
            recipe.model.path,
            ", ".join(arms),
        )


def _source(recipe: Recipe, split: Split) -> str:
    if isinstance(recipe.task, JsonlConfig):
        return Path(getattr(recipe.task, split)).name
    return f"the {split} part of {getattr(recipe.task, 'path', recipe.task.kind)}"
