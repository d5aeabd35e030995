"""From a recipe's reward section to the scorer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lrscale.config.reward import (
    FunctionRewardConfig,
    FunctionsRewardConfig,
    ModelRewardConfig,
    PooledRewardConfig,
    RewardConfig,
    TaskRewardConfig,
    VrCliRewardConfig,
)
from lrscale.reward.budget import FailureBudget
from lrscale.reward.functions import FunctionSpec
from lrscale.reward.limits import Limits
from lrscale.reward.pool import Pool
from lrscale.reward.rules import Shaping, TaskScore
from lrscale.reward.scorer import PooledScorer, Scorer, TaskScorer
from lrscale.reward.source import SourceSpec
from lrscale.reward.weighted import WeightedSpec
from lrscale.reward.worker import WorkerSettings


def build_scorer(
    config: RewardConfig,
    task_score: TaskScore | None,
    *,
    recipe_dir: Path,
    world_size: int = 1,
    log: str = "",
    on_wait: Callable[[], None] = lambda: None,
) -> Scorer:
    """The scorer that a recipe asks for, its workers started.

    Args:
        config: The recipe's section.
        task_score: The task's rule, None for a task without one.
        recipe_dir: Where its relative paths start.
        world_size: Ranks that share the limits of a service.
        log: File for what workers print; empty passes it on to stderr.
        on_wait: Called about twice a second while the reward loads.

    Raises:
        ValueError: the recipe asks for something that is not there or does not load.
    """
    shaping = Shaping(config.length_penalty, config.overlong, config.format)
    if isinstance(config, TaskRewardConfig):
        if task_score is None:
            raise ValueError(
                "reward.kind is `task`, but this task has no answer rule of its own. "
                "Set reward.kind: function and reward.path to a file with your reward function."
            )
        return TaskScorer(task_score, shaping, fingerprint(config, recipe_dir))
    pool = Pool(
        source_of(config, recipe_dir),
        limits_of(config, world_size),
        WorkerSettings(memory_mib=config.pool.memory_mib, log=log),
    )
    return PooledScorer(
        pool,
        shaping,
        FailureBudget(config.max_failed_share, config.max_failed_steps),
        fingerprint=fingerprint(config, recipe_dir),
        fixed_batches=isinstance(config, ModelRewardConfig | VrCliRewardConfig),
        on_wait=on_wait,
    )


def source_of(config: PooledRewardConfig, recipe_dir: Path) -> SourceSpec:
    """What a worker is to load."""
    match config:
        case FunctionRewardConfig():
            return FunctionSpec(_path(recipe_dir, config.path), config.name)
        case FunctionsRewardConfig():
            return WeightedSpec(
                tuple(
                    (one.label, one.weight, FunctionSpec(_path(recipe_dir, one.path), one.name))
                    for one in config.functions
                )
            )


def limits_of(config: PooledRewardConfig, world_size: int = 1) -> Limits:
    """A rank's part of what the recipe allows all of them."""
    pool = config.pool
    return Limits(
        workers=pool.workers,
        timeout_s=config.timeout_s,
        start_timeout_s=pool.start_timeout_s,
        batch_size=pool.batch_size,
        max_wait_s=pool.max_wait_s,
        retries=pool.retries,
        backoff_s=pool.backoff_s,
        concurrency=max(1, pool.concurrency // world_size) if pool.concurrency else 0,
        rate_per_s=pool.rate_per_s / world_size,
    )


def fingerprint(config: RewardConfig, recipe_dir: Path) -> str:
    """A hash of the section and of the user's files that it names."""
    digest = hashlib.sha256(config.model_dump_json().encode())
    paths = [config.path] if isinstance(config, FunctionRewardConfig) else []
    if isinstance(config, FunctionsRewardConfig):
        paths = [one.path for one in config.functions]
    for path in paths:
        with suppress(OSError):  # the worker says what is wrong with it
            digest.update(Path(_path(recipe_dir, path)).read_bytes())
    return digest.hexdigest()


def _path(recipe_dir: Path, path: str) -> str:
    return str((recipe_dir / Path(path).expanduser()).absolute())
