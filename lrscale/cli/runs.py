"""What can be asked of a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrscale.cli.app import app, say


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
