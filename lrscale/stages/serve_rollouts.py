"""The rollout engines of one node of a job: what a role of cluster.split runs (rollout.placement: separate).

    python -m lrscale.stages serve-rollouts RUN_DIR

waits for the trainer to lay down the model's config, starts as many engines as the node has room for, starts those
anew that die, and ends with the job. Their addresses lie in the run directory, where the trainer looks for them.
Exit codes: 0 ended, 3 the recipe asks for no such engines, 6 an engine does not start, 7 no such run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from lrscale.config.load import read_recipe
from lrscale.config.recipe import Recipe
from lrscale.config.rollout import VllmRolloutConfig
from lrscale.parallel.ranks import node_name
from lrscale.rollout.shared_memory import new_shared_folder
from lrscale.rollout.vllm.client import EngineError
from lrscale.rollout.vllm.fleet import Fleet
from lrscale.rollout.vllm.process import EngineProcess
from lrscale.stages.attempts import termination_interrupts
from lrscale.stages.rollout_engines import NEEDS_VLLM, engine_settings, engine_variables, engines_folder, served_folder

_LOOK_S = 1.0
BAD_RECIPE, FAILED, NOT_FOUND, INTERRUPTED = 3, 6, 7, 130


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lrscale.stages serve-rollouts", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run_dir", type=Path, help="a run directory with recipe.json")
    parser.add_argument("--host", default="0.0.0.0", help="interface to listen on: the trainer is on another node")
    options = parser.parse_args(arguments)
    if not (options.run_dir / "recipe.json").is_file():
        print(f"error: {options.run_dir} is no run directory: it has no recipe.json", file=sys.stderr)
        return NOT_FOUND
    recipe = read_recipe(options.run_dir / "recipe.json")
    config = recipe.rollout
    if not isinstance(config, VllmRolloutConfig) or config.placement != "separate":
        print(
            "error: the recipe has no engines for a role: needed rollout: {kind: vllm, placement: separate}",
            file=sys.stderr,
        )
        return BAD_RECIPE
    if find_spec("vllm") is None:
        print(f"error: {NEEDS_VLLM}", file=sys.stderr)
        return BAD_RECIPE
    try:
        with termination_interrupts():
            serve(recipe, config, options.run_dir, options.host)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (EngineError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    return FAILED


def serve(recipe: Recipe, config: VllmRolloutConfig, run_dir: Path, host: str) -> None:
    """Until interrupted. EngineError where an engine does not start."""
    started = time.monotonic()
    while not (served_folder(run_dir) / "config.json").is_file():
        if time.monotonic() - started > config.start_timeout_s:
            raise EngineError(f"the trainer has not laid down {served_folder(run_dir)} within rollout.start_timeout_s")
        time.sleep(_LOOK_S)
    while True:
        serve_attempt(recipe, config, run_dir, host)
        _say("the run was started anew: so are its engines")


def serve_attempt(recipe: Recipe, config: VllmRolloutConfig, run_dir: Path, host: str) -> None:
    """Engines of the run's newest attempt, until there is a newer one: its trainer looks for their addresses there."""
    shared = new_shared_folder()
    settings = replace(engine_settings(recipe, config, run_dir, shared), host=host)
    folder = engines_folder(run_dir).resolve()
    owned = [
        EngineProcess(f"{node_name()}-{index}", settings, folder, engine_variables(recipe, config, index))
        for index in range(engines_here(recipe, config))
    ]
    fleet = Fleet(folder, len(owned), owned, start_timeout_s=config.start_timeout_s, say=_say)
    fleet.start()
    up: list[str] = []
    try:
        while engines_folder(run_dir).resolve() == folder:
            if (now := sorted(fleet.ready())) != up:
                up = now
                _say(f"rollout engines of this node: {', '.join(up)}")
            time.sleep(_LOOK_S)
    finally:
        fleet.close()
        shutil.rmtree(shared, ignore_errors=True)


def engines_here(recipe: Recipe, config: VllmRolloutConfig) -> int:
    """Engines of this node: as many as its GPUs hold, on a CPU an even share of all."""
    nodes = sum(role.nodes for role in recipe.cluster.split.roles if "serve-rollouts" in role.command) or 1
    here = -(-config.engines // nodes)
    return (
        here
        if recipe.model.device == "cpu"
        else min(here, max(1, recipe.cluster.gpus_per_node // config.tensor_parallel))
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
