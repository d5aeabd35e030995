"""Proof that a run resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrscale.cli.app import Overrides, app, say


@app.command("verify-resume")
def verify(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]...", help="Files or names; none: tiny-short.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=1, help="How often the second run is killed.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Draws the moments and the victims.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Folder to keep both runs in; default: none if they agree.")] = None,
) -> None:
    """Prove that a killed run resumes exactly: run the recipe here twice, once killed at random moments, and compare."""
    from lrscale.config.load import load_recipe
    from lrscale.launch.verification import different, folder_for, verify_resume
    from lrscale.report.comparison import compare_runs

    loaded = load_recipe(recipes or ["tiny-short"], overrides or [])
    with folder_for(keep) as folder:
        runs = verify_resume(loaded, folder, kills=kills, seed=seed, say=say)
        found = compare_runs(runs.left_alone, runs.killed)
        if found.difference is not None:
            raise different(runs, found.difference)
        say(
            f"equal bit for bit after {runs.kills} kills ({runs.inside_checkpoint} inside a checkpoint): "
            f"{found.lines} lines of metrics, {found.model_files} files of weights"
        )
