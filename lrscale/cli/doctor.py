"""What is looked at before a run is submitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lrscale.cli.app import Overrides, app, say
from lrscale.cli.launching import CONFIG_HOME, ConfigHome, slurm_options

if TYPE_CHECKING:
    from lrscale.config.diagnosis import Check


@app.command()
def doctor(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]...", help="Files or names; none: cluster and installation alone."),
    ] = None,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option("--nodes", "-N", min=1, help="As for lrscale launch.")] = None,
    partition: Annotated[str | None, typer.Option("--partition", "-p", help="As for lrscale launch.")] = None,
    time: Annotated[str | None, typer.Option("--time", "-t", help="As for lrscale launch.")] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where run directories lie.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines: JSON on stdout.")] = False,
    config_home: ConfigHome = CONFIG_HOME,
) -> None:
    """Look for what would make a run fail.

    Cluster, plan, folders, installation, model, data, tokenizer, reward. The nodes themselves are looked at by the first step of the job. Exit code 4 if something failed.
    """
    from lrscale.config.cluster_file import FILE
    from lrscale.config.diagnosis import described, failed
    from lrscale.config.load import load_recipe
    from lrscale.launch.doctor import examine, exit_code_of

    config = config_home.expanduser() / FILE
    loaded = None
    options = list(slurm_options(nodes, partition, time))
    if recipes or overrides or options:
        slurm = True if options else None
        loaded = load_recipe(recipes or (), overrides or (), options, slurm=slurm, cluster_file=config)
    say("looking (loading torch takes a few seconds)")
    checks: list[Check] = []
    for check in examine(loaded, runs_dir, config):
        checks.append(check)
        if not as_json:
            typer.echo(described([check]))
    if as_json:
        typer.echo(json.dumps({"passed": not failed(checks), "checks": [check.to_json() for check in checks]}))
    count = len(failed(checks))
    say(f"{count} failed: see above" if count else "nothing that would make it fail was found")
    raise typer.Exit(exit_code_of(checks))
