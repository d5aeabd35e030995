"""What can be asked of a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrscale.cli.app import Overrides, app, say


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One or several run directories.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the first run.")] = None,
) -> None:
    """Write report.html (and its PNG) from what the runs have logged so far. Prints the files written."""
    from lrscale.launch.errors import ExitCode, LaunchError
    from lrscale.report.page import write_report

    if out is not None and out.suffix.lower() not in ("", ".html", ".htm") and not out.is_dir():
        raise LaunchError(
            f"--out {out}: a report is a .html file, not {out.suffix}",
            code=ExitCode.USAGE,
            help=f"give {out.with_suffix('.html')}, or a folder, a name without a suffix",
        )
    try:
        written = write_report(runs, out or runs[0] / "report.html")
    except FileNotFoundError as error:
        raise LaunchError(str(error), code=ExitCode.NOT_FOUND) from error
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise LaunchError(f"no report: {error}", code=ExitCode.RUN_FAILED) from error
    for path in written:
        typer.echo(path)


@app.command("replay-step")
def replay_step(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    step: Annotated[str | None, typer.Option(help="A folder in RUN/failed; default: the newest.")] = None,
) -> None:
    """Find the row and the module that made an update of a run not finite."""
    from lrscale.launch.local import run_module

    arguments = [str(run), *(["--step", step] if step else [])]
    raise typer.Exit(run_module("lrscale.stages", ["replay-step", *arguments], say=say))


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
