"""The collaborators of a run, put together once and passed to every stage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.config.recipe import Recipe
from lrscale.latent import LatentPolicy
from lrscale.parallel.build import build_engine
from lrscale.parallel.engine import Engine
from lrscale.parallel.lockstep import ALONE, Lockstep
from lrscale.parallel.trackers import open_trackers
from lrscale.report.metrics import MetricsLog
from lrscale.reward.build import Surroundings, build_scorer
from lrscale.rollout.engine import RolloutEngine
from lrscale.rollout.local import LocalRollouts
from lrscale.stages.drain import NEVER, Drain
from lrscale.stages.pending import PendingRollouts
from lrscale.stages.prompts import PromptBook
from lrscale.stages.rollout_engines import build_rollouts
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
    drain: Drain = NEVER

    @property
    def policy(self) -> LatentPolicy:
        return self.engine.policy

    @property
    def book(self) -> PromptBook:
        return self.sampler.book


def build_parts(recipe: Recipe, run_dir: Path, lockstep: Lockstep = ALONE) -> Parts:
    """Load and connect everything that a recipe names. ValueError where something does not fit or is missing."""
    if lockstep.ranks.is_main:
        log = RunLog(MetricsLog(run_dir / "metrics.jsonl"), open_trackers_of(recipe, run_dir))
    else:
        log = RunLog(None, show=False)
    engine = build_engine(recipe, lockstep, read_ds_config(run_dir))
    rollouts = build_rollouts(recipe, engine, run_dir, log.say)
    sampler = build_sampler(
        recipe, engine.policy, recipe_dir=run_dir, display=log, rollouts=rollouts, lockstep=lockstep
    )
    check_prompt_counts(recipe, sampler.book, recipe.stages.run)
    warn_of_untrained_projector(recipe, sampler.policy)
    return Parts(recipe, run_dir, engine, sampler.rollouts, sampler, log)


def read_ds_config(run_dir: Path) -> dict[str, Any] | None:
    """DeepSpeed's configuration as the launcher resolved it, where there is one."""
    path = run_dir / "ds_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def build_sampler(
    recipe: Recipe,
    policy: LatentPolicy,
    *,
    recipe_dir: Path,
    display: Display,
    rollouts: RolloutEngine | None = None,
    lockstep: Lockstep = ALONE,
) -> Sampler:
    """Task, reward and rollout engine around a policy; all that evaluation needs. One process by default.

    `rollouts` are those of a run: `recipe_dir` is its directory then, which keeps what reward workers print and what a
    stopped run left unscored. Close the sampler's scorer in the end.
    """
    chat_template = recipe.model.chat_template
    task = build_task(
        recipe.task,
        seed=recipe.seed,
        recipe_dir=recipe_dir,
        encode=lambda text: policy.encode(text, chat_template=chat_template),
    )
    rank, in_run = lockstep.ranks.rank, rollouts is not None
    scorer = build_scorer(
        recipe.reward,
        task_score(task),
        Surroundings(
            recipe_dir,
            world_size=lockstep.ranks.world_size,
            local_rank=lockstep.ranks.local_rank,
            log=str(recipe_dir / "attempts" / "latest" / f"rewards-rank{rank}.log") if in_run else "",
        ),
        on_wait=lockstep.tick,
    )
    book = PromptBook(task, policy, chat_template=chat_template)
    pending = PendingRollouts(recipe_dir / "pending", rank) if in_run else PendingRollouts()
    engine = rollouts or LocalRollouts(policy, recipe.rollout)
    return Sampler(engine, scorer, book, policy, display, lockstep, pending)


def open_trackers_of(recipe: Recipe, run_dir: Path) -> Trackers | None:
    """The trackers that the recipe asks for, if any."""
    if not recipe.report.trackers:
        return None
    return open_trackers(recipe.report.trackers, recipe.report.project, run_dir, recipe.model_dump(mode="json"))
