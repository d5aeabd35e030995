"""What can be asked of a run directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lrscale.cli.app import app, say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lrscale.launch.attempts import Attempt
    from lrscale.launch.status import RunStatus

RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its directory.")]
RunsDir = Annotated[Path, typer.Option(help="Where run directories lie.")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines: JSON on stdout.")]
_RUNS = Path("runs")
_RECENT_S = 7 * 86400.0


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's name, or its directory.")] = None,
    runs_dir: RunsDir = _RUNS,
    as_json: AsJson = False,
) -> None:
    """Where runs stand: state, step, reward, time to go.

    Without RUN, all that go on or were touched within a week. Exit code 75 if SLURM had to be asked and did not answer.
    """
    import time

    from lrscale.launch import overview, runs
    from lrscale.launch.status import ACTIVE, exit_code_of, status_of, statuses_of

    if run is not None:
        found = status_of(runs.find_run(run, runs_dir))
        typer.echo(json.dumps(found.to_json()) if as_json else overview.described(found))
        raise typer.Exit(exit_code_of([found]))
    since = time.time() - _RECENT_S
    statuses = statuses_of(runs.all_runs(runs_dir))
    shown = [one for one in statuses if one.state in ACTIVE or runs.touched(one.path) > since]
    _print_table(shown, runs_dir, as_json=as_json)
    if len(shown) < len(statuses) and not as_json:
        say(f"{len(statuses) - len(shown)} older: lrscale list")
    raise typer.Exit(exit_code_of(shown))


@app.command("list")
def list_runs(runs_dir: RunsDir = _RUNS, as_json: AsJson = False) -> None:
    """All runs of a folder, the newest first."""
    from lrscale.launch.runs import all_runs
    from lrscale.launch.status import exit_code_of, statuses_of

    statuses = statuses_of(all_runs(runs_dir))
    _print_table(statuses, runs_dir, as_json=as_json)
    raise typer.Exit(exit_code_of(statuses))


@app.command()
def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Only this rank's log.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Which start; default: the newest.")] = None,
    errors: Annotated[bool, typer.Option("--errors", help="Only errors of all logs, each once.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines of each log; 0: all.")] = 200,
    runs_dir: RunsDir = _RUNS,
    as_json: AsJson = False,
) -> None:
    """The logs of a run, or only the errors in them.

    Those of the batch script and the main rank, unless --rank names another one; --errors reads them all.
    """
    from lrscale.launch import logs as files
    from lrscale.launch.errors import ExitCode, LaunchError
    from lrscale.launch.runs import find_run

    path = find_run(run, runs_dir)
    if errors and follow:
        raise LaunchError("--errors and --follow do not go together", code=ExitCode.USAGE, help="leave one out")
    if follow and attempt is None:
        follow_run(path, rank=rank, lines=lines, as_json=as_json)
        return
    early = files.early_logs(path)[-1:]
    if early and attempt is None and not files.attempt_folders(path):
        _print_ends(dict.fromkeys(early), lines, _LinePrinter(path, as_json=as_json))
        return
    chosen = files.choose_attempt(path, attempt)
    if errors:
        _print_errors(path, chosen, rank, as_json=as_json)
        return
    paths = files.log_files(chosen, rank) if rank is not None else files.story_files(chosen)
    _print_ends(dict.fromkeys(paths), lines, _LinePrinter(path, as_json=as_json))


def follow_run(run_dir: Path, *, rank: int | None = None, lines: int = 200, as_json: bool = False) -> None:
    """Show the end of the newest logs and whatever comes, attempt after attempt, until the run has ended."""
    from lrscale.launch import logs as files

    printer = _LinePrinter(run_dir, as_json=as_json)
    read = files.ends_of(files.newest_files(run_dir, rank))
    _print_ends(read, lines, printer)
    watch = files.RunWatch(run_dir, say)
    for log, line in files.follow(run_dir, rank, read, watch.over):
        printer.show(log, line)


@app.command()
def stop(
    run: RunName,
    now: Annotated[
        bool, typer.Option("--now", help="At once: what was done since the last checkpoint is lost.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Wait until it has ended.")] = True,
    runs_dir: RunsDir = _RUNS,
    as_json: AsJson = False,
) -> None:
    """Ask a run to save a checkpoint and end.

    It does so after the step at hand, and does not go back into the queue; `lrscale resume` goes on from there.
    """
    from lrscale.launch import overview
    from lrscale.launch.drain import stop as ask_to_stop
    from lrscale.launch.drain import wait_for_end
    from lrscale.launch.runs import find_run
    from lrscale.launch.status import status_of

    path = find_run(run, runs_dir)
    say(f"{path.name}: {ask_to_stop(status_of(path), now=now)}")
    if wait:
        say("waiting for its end (Ctrl-C stops the waiting, not the request)")
    ended = wait_for_end(path, limit_s=None if wait else 0.0)
    typer.echo(json.dumps(ended.to_json()) if as_json else overview.described(ended))


@app.command()
def resume(
    run: RunName,
    nodes: Annotated[
        int | None, typer.Option("--nodes", "-N", min=1, help="Another number of nodes; checkpoints fit any.")
    ] = None,
    partition: Annotated[str | None, typer.Option("--partition", "-p", help="Another SLURM partition.")] = None,
    time: Annotated[str | None, typer.Option("--time", "-t", help="Another SLURM time limit.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Submit, then show the logs until it ends.")] = False,
    runs_dir: RunsDir = _RUNS,
    as_json: AsJson = False,
) -> None:
    """Go on with a run from its last checkpoint.

    Submitted again if it ran on SLURM or an option of SLURM is given, else on this machine.
    """
    from lrscale.cli.launching import run_here, slurm_options, submit_run
    from lrscale.config.load import load_recipe
    from lrscale.launch.attempts import submitted_jobs
    from lrscale.launch.runs import find_run

    path = find_run(run, runs_dir).absolute()
    options = list(slurm_options(nodes, partition, time))
    loaded = load_recipe(
        [path / "recipe.json"],
        [f"name={json.dumps(path.name)}"],
        options,
        slurm=bool(options) or follow or bool(submitted_jobs(path)),
    )
    if loaded.slurm:
        submit_run(loaded, path.parent, follow=follow, as_json=as_json)
    else:
        run_here(loaded, path.parent, as_json=as_json)


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


def _print_table(statuses: list[RunStatus], runs_dir: Path, *, as_json: bool) -> None:
    from lrscale.launch import overview

    if as_json:
        typer.echo(json.dumps([status.to_json() for status in statuses]))
        return
    if not statuses:
        say(f"no runs in {runs_dir}: lrscale launch begins one, --runs-dir FOLDER looks elsewhere")
        return
    from lrscale.report.table import Cells, plain_table

    header, rows = overview.table(statuses)
    typer.echo(plain_table(Cells(header, rows, text_columns=len(header))))
    unanswered = {status.unanswered for status in statuses if status.unanswered}
    for words in sorted(unanswered):
        say(f"warning: {words}: what needs it is told from the run directories")


def _print_errors(run_dir: Path, attempt: Attempt, rank: int | None, *, as_json: bool) -> None:
    from lrscale.config.diagnosis import described
    from lrscale.launch import logs as files
    from lrscale.launch.attempts import failed_checks, first_failure
    from lrscale.launch.logged_errors import find_errors

    checks = failed_checks(attempt)
    found = find_errors(files.log_files(attempt, rank))
    first = first_failure(attempt)
    if as_json:
        value = {
            "attempt": attempt.number,
            "preflight": [check.to_json() for check in checks],
            "first_failure": asdict(first) if first is not None else None,
            "errors": [asdict(error) for error in found],
        }
        typer.echo(json.dumps(value))
        return
    if first is not None:
        on = f" on {first.node}" if first.node else ""
        typer.echo(f"first failure: rank {first.rank}{on}, exit code {first.code}: {first.reason}\n")
    if checks:
        typer.echo(f"preflight:\n{described(checks)}\n")
    for error in found:
        if not error.echo and (first is None or not error.tells(first.reason)):
            typer.echo(f"{', '.join(error.files)}:\n{error.text}\n")
    echoes = [f"{', '.join(error.files)}: {error.headline}" for error in found if error.echo]
    if echoes:
        typer.echo("\n  ".join(["because of it:" if len(echoes) < len(found) else "only echoes:", *echoes]))
    if not found and first is None and not checks:
        say(f"no errors in the logs of attempt {attempt.number} ({attempt.folder})")
        for words in files.former_ends(run_dir, attempt.number):
            say(f"  {words} (--attempt shows its errors)")


def _print_ends(logs: Mapping[Path, int | None], lines: int, printer: _LinePrinter) -> None:
    """The last lines of logs, each up to a number of bytes, or whole."""
    from lrscale.launch.logs import last_lines

    for log, end in logs.items():
        text, left_out = last_lines(log, lines, end)
        if left_out:
            say(f"{log}: {left_out} lines before these (--lines 0 shows all)")
        for line in text:
            printer.show(log, line)


class _LinePrinter:
    """Lines of several logs, a header wherever the log changes; as JSON an object a line."""

    def __init__(self, run_dir: Path, *, as_json: bool) -> None:
        self._run_dir = run_dir
        self._as_json = as_json
        self._log: Path | None = None

    def show(self, log: Path, line: str) -> None:
        name = log.relative_to(self._run_dir).as_posix()
        if self._as_json:
            typer.echo(json.dumps({"log": name, "line": line}))
            return
        if log != self._log:
            say(f"==> {name} <==")
            self._log = log
        typer.echo(line)
