"""ZeRO-3 with a vLLM engine on every node: samples of each rank, over publications and an engine's death.

    engines_by_node FOLDER RUN_DIR

Every rank samples its share of the prompts greedily, three times: on published weights; while the engine of the second
node dies; and after a publication of the projector alone, before which that engine died once more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import psutil

from lrscale.config.recipe import Recipe
from lrscale.latent import LatentPolicy
from lrscale.rollout.engine import SamplingPlan
from lrscale.rollout.vllm.engine import VllmRollouts
from lrscale.stages.rollout_engines import vllm_rollouts
from tests.distributed.programs.job import build, report, start

PROMPTS = 16


def prompts(policy: LatentPolicy) -> list[list[int]]:
    return [[*policy.encode(f"row {i} "), *policy.marker_ids(1 + i % 3), *policy.encode("ab")] for i in range(PROMPTS)]


def recipe(folder: str, nodes: int) -> Recipe:
    rollout = {"kind": "vllm", "engines": nodes, "other_modes": "local", "enforce_eager": True, "max_model_len": 256}
    return Recipe.model_validate(
        {
            "model": {"path": folder, "device": "cpu"},
            "cluster": {"nodes": nodes},
            "parallel": {"kind": "zero3", "ranks_per_node": 1},
            "rollout": {**rollout, "max_new_tokens": 24, "batch_rows": 8},
        }
    )


def main() -> None:
    folder, run_dir = sys.argv[1:]
    lockstep = start(timeout_s=400)
    rank, world = lockstep.ranks.rank, lockstep.ranks.world_size
    engine = build("zero3", Path(folder), lockstep)
    made = recipe(folder, world)
    said: list[str] = []
    with closing(vllm_rollouts(made, made.rollout, engine, Path(run_dir), said.append)) as rollouts:
        rollouts.load_weights(engine.full_parameters(), version=1)
        mine = prompts(engine.policy)[rank::world]
        first = sampled(rollouts, mine)
        dying = sampled(rollouts, mine, kill_after=1 if rank == 1 else None)
        if rank == 1:
            kill_engine()
        rollouts.load_weights(engine.full_parameters("projector"), version=2, projector_only=True)
        report(
            lockstep,
            node=lockstep.node,
            engines=rollouts.publisher.usable(),
            samples=[first, dying, sampled(rollouts, mine)],
            version=rollouts.version,
            restarts=sum("starts anew" in line for line in said),
        )


def sampled(
    rollouts: VllmRollouts, mine: Sequence[Sequence[int]], *, kill_after: int | None = None
) -> list[tuple[list[int], int, int]]:
    """By prompt: the completion, how many latents came with it, and the version of the weights."""
    found = {}
    for number, (place, rollout) in enumerate(rollouts.generate(mine, SamplingPlan(seed=1, temperature=0.0)), start=1):
        found[place] = (list(rollout.completion_ids), len(rollout.latents_LH), rollout.policy_version)
        if number == kill_after:
            kill_engine()
    return [found[place] for place in range(len(mine))]


def kill_engine() -> None:
    """vLLM's process that has the model, of this rank's engine."""
    next(p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline())).kill()
