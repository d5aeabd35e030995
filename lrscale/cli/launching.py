"""Starting runs, and the recipes they start from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lrscale.cli.app import Overrides, app, say

if TYPE_CHECKING:
    from lrscale.config.compose import Option
    from lrscale.config.load import LoadedRecipe

ConfigHome = Annotated[
    Path, typer.Option(envvar="XDG_CONFIG_HOME", help="Folder of lrscale/cluster.yaml (lrscale init writes it).")
]
CONFIG_HOME = Path("~/.config")


@app.command()
def launch(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE]...", help="Files or names, later ones on top; none: tiny-cpu.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, instead of the recipe's.")] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where run directories lie.")] = Path("runs"),
    nodes: Annotated[int | None, typer.Option("--nodes", "-N", min=1, help="Nodes of the trainer, on SLURM.")] = None,
    partition: Annotated[str | None, typer.Option("--partition", "-p", help="SLURM partition.")] = None,
    time: Annotated[str | None, typer.Option("--time", "-t", help="SLURM time limit, e.g. 2-00:00:00.")] = None,
    on_slurm: Annotated[
        bool | None, typer.Option("--slurm/--local", help="Where to run, whatever the recipe says.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be done. For SLURM writes the run directory, submits nothing."),
    ] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Ask SLURM when the job could start.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Submit, then show the logs until it ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: JSON on stdout.")] = False,
    in_job: Annotated[bool, typer.Option("--in-job", hidden=True, help="What slurm/train.sh says.")] = False,
    config_home: ConfigHome = CONFIG_HOME,
) -> None:
    """Start a run, or go on with it.

    On this machine, unless one of --nodes, --partition, --time, --slurm, --test-only, --follow is given, or the
    recipe names several nodes (cluster.nodes), other roles (cluster.split) or a partition: then it is submitted to
    SLURM. Prints the run directory; for a submitted job, its id.
    """
    from lrscale.config.cluster_file import FILE
    from lrscale.config.load import load_recipe

    asked = test_only or follow or any(value is not None for value in (nodes, partition, time))
    loaded = load_recipe(
        recipes or (),
        [*(overrides or []), *([f"name={json.dumps(name)}"] if name is not None else [])],
        list(slurm_options(nodes, partition, time)),
        slurm=True if (asked or in_job) and on_slurm is None else on_slurm,
        cluster_file=config_home.expanduser() / FILE,
    )
    if loaded.slurm:
        dry_run = dry_run or in_job
        submit_run(
            loaded, runs_dir, dry_run=dry_run, test_only=test_only, follow=follow, as_json=as_json, in_job=in_job
        )
    else:
        run_here(loaded, runs_dir, dry_run=dry_run, as_json=as_json)


def slurm_options(nodes: int | None, partition: str | None = None, time: str | None = None) -> Iterator[Option]:
    """What options of the command line say of SLURM, as keys of the recipe."""
    from lrscale.config.compose import Option

    values = {"--nodes": nodes, "--partition": partition, "--time": time}
    keys = {"--nodes": "cluster.nodes", "--partition": "cluster.partition", "--time": "cluster.time_limit"}
    yield from (Option(name, keys[name], value) for name, value in values.items() if value is not None)


def run_here(loaded: LoadedRecipe, runs_dir: Path, *, dry_run: bool = False, as_json: bool = False) -> None:
    """Start a run on this machine, or go on with it, and wait for its end."""
    from lrscale.launch import job, local, rundir, submission

    job.require_one_node(loaded)
    files = job.job_files(loaded)
    command = sys.argv[1:]
    if dry_run:
        run = rundir.inspect_run(loaded.recipe, runs_dir)
    else:
        submission.require_no_job(runs_dir / loaded.recipe.name)
        run = rundir.create_run(loaded.recipe, runs_dir, command)
    if dry_run or run.state == "finished":
        say(rundir.describe(run, dry=dry_run))
    else:
        say("\n".join([rundir.describe(run), *job.warnings_of(loaded.recipe)]))
        job.write_job_files(run.path, files)
        module, arguments = job.job_command(loaded.recipe, run.path)
        code = local.run_module(module, arguments, say=say)
        if code:
            say(rundir.after_failure(run, code, command))
            raise typer.Exit(code)
    typer.echo(json.dumps({"run_dir": str(run.path)}) if as_json else run.path)


def submit_run(
    loaded: LoadedRecipe,
    runs_dir: Path,
    *,
    dry_run: bool = False,
    test_only: bool = False,
    follow: bool = False,
    as_json: bool = False,
    in_job: bool = False,
) -> None:
    """Submit a run to SLURM; `follow` shows its logs until it ends."""
    import shlex

    from lrscale.launch import on_slurm, plan_file, rundir, slurm, submission

    planned = on_slurm.plan(loaded, runs_dir, dry=dry_run, say=say, in_job=in_job)
    run = on_slurm.write(planned, runs_dir, sys.argv[1:], dry=dry_run or test_only)
    say("\n  ".join([rundir.describe(run, dry=dry_run or test_only), *planned.lines, shlex.join(planned.command)]))
    told = {"run_dir": str(run.path), "job_id": None, **planned.values, "sbatch": planned.command}
    if dry_run or run.state == "finished":
        typer.echo(json.dumps(told) if as_json else run.path)
    elif test_only:
        told["test_only"] = slurm.test_only(planned.command)
        typer.echo(json.dumps(told) if as_json else told["test_only"])
    else:
        plan_file.keep_own_plan(planned.loaded, run.path)
        told["job_id"] = submission.submit(planned.loaded.recipe, run.path, planned.command)
        shown = shlex.quote(str(run.path))
        say(f"submitted; lrscale status {shown}, lrscale logs -f {shown}, lrscale stop {shown}")
        typer.echo(json.dumps(told) if as_json else told["job_id"])
        if follow:
            from lrscale.cli.runs import follow_run

            follow_run(run.path)


@app.command()
def recipes() -> None:
    """List the recipes that come with lrscale."""
    from lrscale.config.shipped import shipped_recipes, summary

    for name, path in shipped_recipes().items():
        typer.echo(f"{name:<18} {summary(path)}")
    say("lrscale launch NAME starts one, lrscale show NAME prints all its keys")


@app.command()
def show(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]...", help="Files or names; none: tiny-cpu.", show_default=False),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print the resolved recipe as JSON, every default written out."""
    from lrscale.config.load import dump_recipe, load_recipe

    typer.echo(dump_recipe(load_recipe(recipes or (), overrides or []).recipe), nl=False)
