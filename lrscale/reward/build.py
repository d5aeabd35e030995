"""From a recipe's reward section to the scorer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lrscale.config.reward import (
    FunctionRewardConfig,
    FunctionsRewardConfig,
    HttpRewardConfig,
    ModelRewardConfig,
    PooledRewardConfig,
    RewardConfig,
    TaskRewardConfig,
    VrCliRewardConfig,
)
from lrscale.reward.budget import FailureBudget
from lrscale.reward.functions import FunctionSpec
from lrscale.reward.limits import Limits
from lrscale.reward.models import ClassifierSpec, ModelPlace
from lrscale.reward.pool import Pool
from lrscale.reward.remote import RemoteSpec
from lrscale.reward.rules import Shaping, TaskScore
from lrscale.reward.scorer import PooledScorer, Scorer, TaskScorer
from lrscale.reward.source import SourceSpec
from lrscale.reward.vr_cli import VrCliSpec
from lrscale.reward.weighted import WeightedSpec
from lrscale.reward.worker import WorkerSettings


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where a scorer works."""

    recipe_dir: Path
    """Where relative paths start, and where base perplexities are kept."""
    world_size: int = 1
    """Ranks that share the limits of a service."""
    local_rank: int = 0
    """The GPU of this rank."""
    log: str = ""
    """File for what workers print; empty passes it on to stderr."""


def build_scorer(
    config: RewardConfig,
    task_score: TaskScore | None,
    surroundings: Surroundings,
    *,
    on_wait: Callable[[], None] = lambda: None,
) -> Scorer:
    """The scorer that a recipe asks for, its workers started.

    Args:
        config: The recipe's section.
        task_score: The task's rule, None for a task without one.
        surroundings: Where it works.
        on_wait: Called about twice a second while the reward loads.

    Raises:
        ValueError: the recipe asks for something that is not there or does not load.
    """
    folder = surroundings.recipe_dir
    shaping = Shaping(config.length_penalty, config.overlong, config.format)
    if isinstance(config, TaskRewardConfig):
        if task_score is None:
            raise ValueError(
                "reward.kind is `task`, but this task has no answer rule of its own. "
                "Set reward.kind: function and reward.path to a file with your reward function."
            )
        return TaskScorer(task_score, shaping, fingerprint(config, folder))
    pool = Pool(
        source_of(config, surroundings),
        limits_of(config, surroundings.world_size),
        WorkerSettings(memory_mib=config.pool.memory_mib, log=surroundings.log),
    )
    return PooledScorer(
        pool,
        shaping,
        FailureBudget(config.max_failed_share, config.max_failed_steps),
        fingerprint=fingerprint(config, folder),
        fixed_batches=isinstance(config, ModelRewardConfig),
        on_wait=on_wait,
    )


def source_of(config: PooledRewardConfig, surroundings: Surroundings) -> SourceSpec:
    """What a worker is to load."""
    recipe_dir = surroundings.recipe_dir
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
        case HttpRewardConfig():
            token_file = _path(recipe_dir, config.token_file) if config.token_file else ""
            return RemoteSpec(config.url, config.timeout_s, token_file)
        case ModelRewardConfig():
            return ClassifierSpec(_model(config, surroundings), config.max_tokens)
        case VrCliRewardConfig():
            cache = str((recipe_dir / "vr_cli_baselines").absolute())
            return VrCliSpec(_model(config, surroundings), config.max_tokens, cache)


def limits_of(config: PooledRewardConfig, world_size: int = 1) -> Limits:
    """A rank's part of what the recipe allows all of them."""
    pool = config.pool
    return Limits(
        workers=pool.workers,
        # A service's client gives up by itself, within twice its time, and then tries again; this is for what hangs.
        timeout_s=config.timeout_s * 2 + 5 if isinstance(config, HttpRewardConfig) else config.timeout_s,
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


def _model(config: ModelRewardConfig | VrCliRewardConfig, surroundings: Surroundings) -> ModelPlace:
    device = f"cuda:{surroundings.local_rank}" if config.device == "cuda" else config.device
    folder = surroundings.recipe_dir / Path(config.path).expanduser()
    path = str(folder.absolute()) if folder.is_dir() else config.path
    return ModelPlace(path, device, config.dtype, config.threads)
