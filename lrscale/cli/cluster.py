"""Making lrscale at home on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrscale.cli.app import app, say
from lrscale.cli.launching import CONFIG_HOME, ConfigHome


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="The recipe to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    config_home: ConfigHome = CONFIG_HOME,
) -> None:
    """Write a recipe with every key explained and, where SLURM is, the cluster file. Prints the files written."""
    from lrscale.config.cluster_file import FILE
    from lrscale.launch import init, slurm
    from lrscale.launch.errors import LaunchError

    wanted = {recipe: init.recipe_yaml(recipe)}
    refusal: LaunchError | None = None
    if slurm.available():
        try:
            wanted[config_home.expanduser() / FILE] = init.cluster_yaml(slurm.partitions())
        except LaunchError as error:  # the recipe can be written all the same
            refusal = error
    else:
        say("SLURM is not on this machine: no cluster file; run lrscale init on a login node for one")
    for path, text in wanted.items():
        if init.write_new(path, text, force=force):
            typer.echo(path)
        else:
            say(f"{path} is there already and is left as it is (--force replaces it)")
    if refusal is not None:
        say("no cluster file:")
        raise refusal
