"""A launch that goes to SLURM, up to the point at which it is submitted: checked, planned, written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.config.errors import Place, Problem, RecipeError
from lrscale.config.load import LoadedRecipe
from lrscale.launch import slurm
from lrscale.launch.cluster_fit import require_fit, require_sound
from lrscale.launch.errors import LaunchError
from lrscale.launch.job import dims_of, outgrown, planned_recipe, warnings_of, write_job_files
from lrscale.launch.rundir import RunDir, create_run
from lrscale.launch.submission import (
    require_no_job,
    require_secrets,
    sbatch_command,
    settled,
    submission_files,
    write_executable,
)
from lrscale.plan.memory import memory_plan
from lrscale.plan.phases import MemoryPlan
from lrscale.plan.summary import plan_lines, plan_values
from lrscale.plan.topology import BatchPlan, batch_plan, dividing_nodes


@dataclass(frozen=True, slots=True)
class Planned:
    """A run that is ready to be submitted."""

    loaded: LoadedRecipe
    command: tuple[str, ...]
    """The sbatch line."""
    lines: tuple[str, ...]
    """The plan in words."""
    values: dict[str, Any]
    """The plan in numbers."""


def plan(
    loaded: LoadedRecipe, runs_dir: Path, *, dry: bool, say: Callable[[str], None], in_job: bool = False
) -> Planned:
    """Check a recipe against itself and the cluster; nothing is written.

    Args:
        loaded: With the cluster file under it.
        runs_dir: Where its run directory will lie.
        dry: Do without SLURM where there is none, and without secrets.
        say: Takes lines for people.
        in_job: A job that somebody submitted by hand asks: it runs, so the cluster's limits do not matter any more.

    Raises:
        RecipeError: it is beyond the cluster's limits, or does not divide over its ranks.
        LaunchError: a secret is missing (4), SLURM is not here (5) or does not answer (75).
    """
    loaded = settled(loaded)
    recipe, dims = loaded.recipe, dims_of(loaded.recipe.model.path)
    memory = None
    if dims is not None:
        counted, zero = planned_recipe(loaded, dims)
        memory = memory_plan(counted, dims, zero=zero)
    too_long = outgrown(loaded, dims) if dims is not None else None
    require_sound(loaded, memory)
    if not in_job:
        _check_cluster(loaded, memory, dry=dry, say=say)
    batch = batch_of(loaded)
    if in_job or not dry:
        require_secrets(loaded)
    run_dir = (runs_dir / recipe.name).absolute()
    return Planned(
        loaded,
        tuple(sbatch_command(recipe, run_dir)),
        (
            *plan_lines(recipe, dims, batch, memory),
            *warnings_of(recipe),
            *((f"warning: {too_long.message}",) if too_long else ()),
        ),
        plan_values(recipe, dims, batch, memory),
    )


def write(planned: Planned, runs_dir: Path, command: Sequence[str], *, dry: bool) -> RunDir:
    """Make the run directory with everything that the job reads; a finished run is left as it is.

    Raises:
        LaunchError: the directory belongs to another recipe, is in use or has a job (75), or cannot be written.
    """
    recipe = planned.loaded.recipe
    if not dry:
        require_no_job(runs_dir / recipe.name)
    run = create_run(recipe, runs_dir, command)
    if run.state != "finished":
        files = submission_files(planned.loaded, run.path.absolute())
        write_job_files(run.path, files)
        write_executable(run.path, files)
    return run


def batch_of(loaded: LoadedRecipe) -> BatchPlan | None:
    """How the sequences of an RL step are shared out; None without RL. RecipeError where they do not divide."""
    recipe = loaded.recipe
    if "rl" not in recipe.stages.run or not recipe.stages.rl.steps:
        return None
    try:
        return batch_plan(recipe)
    except ValueError as error:
        fitting = [f"--nodes {nodes}" for nodes in dividing_nodes(recipe)]
        help_ = " or ".join([*fitting, "other stages.rl.prompts_per_step or group_size"])
        place = loaded.places.get("cluster.nodes", Place("defaults"))
        raise RecipeError([Problem(place, "cluster.nodes", str(error), help_)]) from error


def _check_cluster(loaded: LoadedRecipe, memory: MemoryPlan | None, *, dry: bool, say: Callable[[str], None]) -> None:
    if dry and not slurm.available():
        say("SLURM is not on this machine: the plan is not checked against a cluster")
        return
    try:
        partitions = slurm.partitions()
    except LaunchError as error:
        if not dry:
            raise
        say(f"the plan is not checked against the cluster: {str(error).splitlines()[0].removeprefix('error: ')}")
        return
    require_fit(loaded, partitions, memory)
