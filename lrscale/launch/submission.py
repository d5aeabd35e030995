"""A run as a SLURM job: its files, its sbatch line, and its submission, once at a time."""

from __future__ import annotations

import fcntl
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lrscale.config.load import LoadedRecipe
from lrscale.config.recipe import Recipe
from lrscale.config.shipped import shared_folder
from lrscale.launch import slurm
from lrscale.launch.attempts import JOBS, submitted_jobs, unfit_nodes
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.job import dims_of, job_files
from lrscale.launch.job_env import job_env
from lrscale.plan.gathering import gather, whole_copy_gib
from lrscale.plan.topology import collective_timeout_s, topology


def settled(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe with what is left to the model's size decided: how decoding gathers weights, and how long ranks wait."""
    recipe, dims = loaded.recipe, dims_of(loaded.recipe.model.path)
    if dims is None or recipe.parallel.kind == "single":
        return loaded
    changes: dict[str, str | float] = {"gather": gather(recipe, dims)}
    if "parallel.collective_timeout_s" not in loaded.places:
        changes["collective_timeout_s"] = collective_timeout_s(recipe, whole_copy_gib(recipe, dims))
    return replace(loaded, recipe=recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=changes)}))


def sbatch_command(recipe: Recipe, run_dir: Path) -> list[str]:
    """The line that submits a run directory (absolute) to SLURM."""
    cluster, there = recipe.cluster, topology(recipe)
    # In a file name of SLURM's % starts a pattern.
    log = str(run_dir / "slurm-").replace("%", "%%") + "%j.log"
    nodes = there.nodes if cluster.split.heterogeneous else there.nodes + there.other_nodes
    command = ["sbatch", f"--job-name={recipe.name}", f"--output={log}", "--open-mode=append", "--export=ALL"]
    command += ["--requeue", f"--signal=B:USR2@{cluster.drain_s}", *_resources(recipe, nodes)]
    command += [f"--time={cluster.time_limit}"] if cluster.time_limit else []
    excluded = [*cluster.exclude, *unfit_nodes(run_dir)]
    command += [f"--exclude={','.join(dict.fromkeys(excluded))}"] if excluded else []
    command += cluster.sbatch_flags
    if cluster.split.heterogeneous:
        for role in cluster.split.roles:
            command += [":", *_resources(recipe, role.nodes)]
    return [*command, str(shared_folder() / "slurm" / "train.sh"), str(run_dir)]


def _resources(recipe: Recipe, nodes: int) -> Iterator[str]:
    cluster, there = recipe.cluster, topology(recipe)
    yield f"--nodes={nodes}"
    yield "--ntasks-per-node=1"
    if cluster.cpus_per_rank is not None:
        yield f"--cpus-per-task={cluster.cpus_per_rank * there.ranks_per_node}"
    if cluster.memory is None:
        yield from ("--exclusive", "--mem=0")
    else:
        yield f"--mem={cluster.memory}"
    if there.gpus_per_node and cluster.gpu_directive == "gpus-per-node":
        yield f"--gpus-per-node={there.gpus_per_node}"
    elif there.gpus_per_node and cluster.gpu_directive == "gres":
        yield f"--gres=gpu:{there.gpus_per_node}"
    yield from (f"--partition={cluster.partition}",) if cluster.partition else ()
    yield from (f"--account={cluster.account}",) if cluster.account else ()


def submission_files(loaded: LoadedRecipe, run_dir: Path) -> dict[str, str]:
    """Names and texts of the files that the job reads, beside recipe.json; `run_dir` absolute.

    Raises:
        RecipeError: its DeepSpeed configuration cannot be resolved.
    """
    line = shlex.join(sbatch_command(loaded.recipe, run_dir))
    return {
        **job_files(loaded),
        "job.env": job_env(loaded.recipe, run_dir, python=sys.executable, share=shared_folder()),
        "job.sh": f"#!/bin/sh\n# How this run is submitted. `lrscale launch` also sees to it that no job of it is waiting.\n{line}\n",
    }


def require_secrets(loaded: LoadedRecipe) -> None:
    """Raises LaunchError (4) if a variable that the recipe names is not in the environment that jobs inherit."""
    # A child is asked, as the job will be one; what it says stays unread.
    missing = [
        name
        for name in loaded.recipe.cluster.secrets
        if subprocess.run(["printenv", name], stdout=subprocess.DEVNULL, check=False).returncode
    ]
    if missing:
        raise LaunchError(
            f"not in the environment: {', '.join(missing)}",
            code=ExitCode.PREFLIGHT,
            place=f"{loaded.places.get('cluster.secrets', 'defaults')} cluster.secrets",
            help=f"set it in this shell (read -rs {missing[0]} && export {missing[0]}); the job inherits it, and it is "
            "written nowhere",
        )


def require_no_job(run_dir: Path) -> None:
    """Raises LaunchError (75) while a job of the run waits or runs, or while SLURM cannot say.

    A run that was copied to a machine without SLURM has none there.
    """
    jobs = submitted_jobs(run_dir)
    if not jobs or (run_dir / "done.json").is_file():
        return
    for submitted in jobs[-3:]:
        try:
            job = slurm.find_job(int(submitted["job_id"]))
        except slurm.NoSlurm:
            return
        if job is not None and not job.over:
            raise LaunchError(
                f"{run_dir} has a job already: {job.job_id} ({job.state})",
                code=ExitCode.TRY_LATER,
                place=str(run_dir / JOBS),
                help=f"watch it (lrscale status {shlex.quote(str(run_dir))}), stop it (lrscale stop), or begin another "
                "run with --name NAME",
            )


def submit(recipe: Recipe, run_dir: Path, command: Sequence[str]) -> int:
    """Submit, and write the job down in jobs.jsonl; of two launches at the same moment the second is refused.

    Raises:
        LaunchError: a job of the run waits or runs (75), SLURM refused (5) or does not answer (75).
    """
    with _submitting(run_dir):
        require_no_job(run_dir)
        job_id = slurm.submit(command)
        line = {"job_id": job_id, "submitted": time.time(), "nodes": recipe.cluster.nodes, "sbatch": list(command)}
        try:
            with (run_dir / JOBS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise LaunchError(
                f"job {job_id} is submitted, but {run_dir / JOBS} cannot be written: {error.strerror}",
                code=ExitCode.PREFLIGHT,
                help=f"make room, then: scancel {job_id} and launch again",
            ) from error
    return job_id


@contextmanager
def _submitting(run_dir: Path) -> Iterator[None]:
    """One launch at a time."""
    path = run_dir / ".submit"
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror}"
        raise LaunchError(message, code=ExitCode.PREFLIGHT, help="make room or rights there") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_executable(run_dir: Path, files: Mapping[str, str]) -> None:
    """job.sh is there to be run."""
    if "job.sh" in files:
        (run_dir / "job.sh").chmod(0o755)
