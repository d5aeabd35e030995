"""What can be known on a login node before a run is submitted: the cluster, the plan, the run directory; and, from a
child process that may load torch, packages, model, data, tokenizer and reward.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lrscale.config.diagnosis import Check, failed
from lrscale.config.errors import RecipeError
from lrscale.config.load import LoadedRecipe, dump_recipe
from lrscale.launch import on_slurm, rundir, slurm
from lrscale.launch.errors import ExitCode, LaunchError

_SILENT = "controller"
"""Name of the check that fails when SLURM does not answer."""


def examine(loaded: LoadedRecipe | None, runs_dir: Path, config: Path) -> Iterator[Check]:
    """One finding after the other, as they are made.

    Args:
        loaded: The recipe, with the cluster file under it; None looks at the cluster and the installation alone.
        runs_dir: Where its run directory will lie.
        config: The cluster file; need not be there.
    """
    yield _controller(loaded)
    yield _cluster_file(config)
    if loaded is not None:
        yield from _plan(loaded, runs_dir)
        yield _run_directory(loaded, runs_dir)
    yield from _with_torch(loaded, runs_dir)


def exit_code_of(checks: Sequence[Check]) -> int:
    """0, 4 where something failed, 75 where that is only that SLURM does not answer."""
    names = {check.name for check in failed(checks)}
    if not names:
        return ExitCode.OK
    return ExitCode.TRY_LATER if names == {_SILENT} else ExitCode.PREFLIGHT


def _controller(loaded: LoadedRecipe | None) -> Check:
    """Its absence counts for a recipe that needs it, its silence for any but one that does without."""
    if not slurm.available():
        if loaded is None or not loaded.slurm:
            return Check("SLURM", "not checked", "its commands are not on this machine")
        help_ = "log in to the cluster, or load its slurm module"
        return Check("SLURM", "failed", "its commands are not on PATH", needed="sbatch and its kin", help=help_)
    try:
        partitions = slurm.partitions()
    except LaunchError as error:
        if loaded is not None and not loaded.slurm:
            return Check("SLURM", "not checked", f"{_first_line(error)}; this recipe does without")
        if isinstance(error, slurm.SlurmUnreachable):
            return Check(_SILENT, "failed", _first_line(error), needed="an answer", help="try again later")
        return Check(
            "SLURM", "failed", _first_line(error), needed="partitions to run in", help="ask the administrators"
        )
    words = [
        f"{one.name} ({one.nodes_usable} of {one.nodes} nodes up, {one.gpus_per_node} GPUs a node)"
        for one in partitions.values()
    ]
    return Check("SLURM", "ok", ", ".join(words))


def _cluster_file(config: Path) -> Check:
    if config.is_file():
        return Check("cluster file", "ok", str(config))
    return Check("cluster file", "not checked", f"there is no {config}: lrscale init writes one")


def _plan(loaded: LoadedRecipe, runs_dir: Path) -> Iterator[Check]:
    name = "plan"
    if not loaded.slurm:
        yield Check(name, "not checked", "the recipe runs on this machine, without SLURM")
        return
    said: list[str] = []
    try:
        on_slurm.plan(loaded, runs_dir, dry=False, say=said.append)
    except RecipeError as error:
        for problem in error.problems:
            found = f"{problem.message}\n{problem.place} {problem.key}".rstrip()
            yield Check(name, "failed", found, needed="a recipe that fits the cluster", help=problem.help)
    except slurm.SlurmUnreachable:
        yield Check(name, "not checked", "SLURM does not answer")
    except LaunchError as error:
        first, _, rest = str(error).partition("\n")
        help_ = rest.replace("  help: ", "").strip()
        yield Check(name, "failed", first.removeprefix("error: "), needed="what the recipe names", help=help_)
    else:
        yield Check(name, "ok", "it fits the partition's nodes, time, GPUs and memory")


def _run_directory(loaded: LoadedRecipe, runs_dir: Path) -> Check:
    name = "run directory"
    try:
        run = rundir.inspect_run(loaded.recipe, runs_dir)
    except LaunchError as error:
        first, _, rest = str(error).partition("\n")
        help_ = rest.replace("  help: ", "").strip()
        return Check(name, "failed", first.removeprefix("error: "), needed="a directory of its own", help=help_)
    return Check(name, "ok", rundir.describe(run, dry=True))


def _with_torch(loaded: LoadedRecipe | None, runs_dir: Path) -> Iterator[Check]:
    """The findings of `python -m lrscale.stages preflight --login`, as they come."""
    with tempfile.TemporaryDirectory(prefix="lrscale-") as folder:
        command = [sys.executable, "-m", "lrscale.stages", "preflight", "--login", f"--runs-dir={runs_dir}"]
        if loaded is not None:
            recipe = Path(folder) / "recipe.json"
            recipe.write_text(dump_recipe(loaded.recipe), encoding="utf-8")
            command.append(str(recipe))
        errors = Path(folder) / "stderr"
        with (
            errors.open("w", encoding="utf-8") as stderr,
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True
            ) as child,
        ):
            assert child.stdout is not None
            for line in child.stdout:
                check = _finding(line)
                if check is not None:
                    yield check
        if child.returncode:
            last = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            found = f"{' '.join(command[:4])} ended with code {child.returncode}: {' '.join(last)}"
            help_ = f"mend this installation of Python: {sys.executable}"
            yield Check("installation", "failed", found, needed="a Python that loads torch and lrscale", help=help_)


def _finding(line: str) -> Check | None:
    """A line of the child; a user's reward function may print others."""
    try:
        return Check.from_json(json.loads(line))
    except (ValueError, TypeError):
        return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].removeprefix("error: ")
