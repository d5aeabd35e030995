"""Starting runs, and the recipes they start from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lrscale.cli.app import Overrides, app, say


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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")] = False,
) -> None:
    """Start a run, or go on with it, on this machine. Prints the run directory."""
    import json

    from lrscale.config.load import load_recipe
    from lrscale.launch import job, local, rundir

    named = [f"name={json.dumps(name)}"] if name is not None else []
    loaded = load_recipe(recipes or (), [*(overrides or []), *named])
    files = job.job_files(loaded)
    command = sys.argv[1:]
    if dry_run:
        run = rundir.inspect_run(loaded.recipe, runs_dir)
    else:
        run = rundir.create_run(loaded.recipe, runs_dir, command)
    if dry_run or run.state == "finished":
        say(rundir.describe(run, dry=dry_run))
        typer.echo(run.path)
        return
    say("\n".join([rundir.describe(run), *job.warnings_of(loaded.recipe)]))
    job.write_job_files(run.path, files)
    module, arguments = job.job_command(loaded.recipe, run.path)
    code = local.run_module(module, arguments, say=say)
    if code:
        say(rundir.after_failure(run, code, command))
        raise typer.Exit(code)
    typer.echo(run.path)


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
