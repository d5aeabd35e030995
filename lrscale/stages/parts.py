"""The collaborators of a run, put together once and passed to every stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrscale.config.recipe import Recipe
from lrscale.latent import LatentPolicy
from lrscale.parallel.build import build_engine
from lrscale.parallel.engine import Engine
from lrscale.parallel.loading import load_policy
from lrscale.parallel.trackers import open_trackers
from lrscale.report.metrics import MetricsLog
from lrscale.reward.scorer import build_scorer
from lrscale.rollout.engine import RolloutEngine
from lrscale.rollout.local import LocalRollouts
from lrscale.stages.prompts import PromptBook
from lrscale.stages.run_log import Display, RunLog, Trackers
from lrscale.stages.sampling import Sampler
from lrscale.stages.start_checks import check_prompt_counts, warn_of_untrained_projector
from lrscale.tasks.catalog import build_task, task_score


@dataclass(frozen=True, slots=True)
class Parts:
    """What every stage is handed."""

    recipe: Recipe
    run_dir: Path
    engine: Engine
    rollouts: RolloutEngine
    sampler: Sampler
    log: RunLog

    @property
    def policy(self) -> LatentPolicy:
        return self.engine.policy

    @property
    def book(self) -> PromptBook:
        return self.sampler.book


def build_parts(recipe: Recipe, run_dir: Path) -> Parts:
    """Load and connect everything that a recipe names. ValueError where something does not fit or is missing."""
    log = RunLog(MetricsLog(run_dir / "metrics.jsonl"), open_trackers_of(recipe, run_dir))
    sampler = build_sampler(recipe, load_policy(recipe.model, recipe.projector), recipe_dir=run_dir, display=log)
    check_prompt_counts(recipe, sampler.book, recipe.stages.run)
    warn_of_untrained_projector(recipe, sampler.policy)
    engine = build_engine(sampler.policy, parallel=recipe.parallel, optimisation=recipe.optimisation)
    return Parts(recipe, run_dir, engine, sampler.rollouts, sampler, log)


def build_sampler(recipe: Recipe, policy: LatentPolicy, *, recipe_dir: Path, display: Display) -> Sampler:
    """Task, reward and rollout engine around a policy; all that evaluation needs."""
    chat_template = recipe.model.chat_template
    task = build_task(
        recipe.task,
        seed=recipe.seed,
        recipe_dir=recipe_dir,
        encode=lambda text: policy.encode(text, chat_template=chat_template),
    )
    scorer = build_scorer(recipe.reward, task_score(task), recipe_dir=recipe_dir)
    book = PromptBook(task, policy, chat_template=chat_template)
    return Sampler(LocalRollouts(policy, recipe.rollout), scorer, book, policy, display)


def open_trackers_of(recipe: Recipe, run_dir: Path) -> Trackers | None:
    """The trackers that the recipe asks for, if any."""
    if not recipe.report.trackers:
        return None
    return open_trackers(recipe.report.trackers, recipe.report.project, run_dir, recipe.model_dump(mode="json"))
