"""The command line: parse, call, print. Everything heavier than Typer is imported inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lrscale import __version__

app = typer.Typer(
    name="lrscale",
    help="Latent reasoning (LiteReason) for language models: train, evaluate, read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. stages.rl.steps=40.")
]


def say(text: str) -> None:
    """Prose goes to stderr; stdout is for machines."""
    typer.echo(text, err=True)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lrscale {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


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
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run directory, model folder or hub id.")],
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="Task and sampling; a run has its own, a model takes tiny-cpu's."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Accuracy and length of a run's arms, or of any model, on held-out prompts."""
    from lrscale.launch.local import run_module
    from lrscale.launch.targets import evaluation_arguments

    with evaluation_arguments(target, recipes or [], overrides or []) as arguments:
        code = run_module("lrscale.stages", ["evaluate", *arguments], say=say)
    raise typer.Exit(code)


@app.command("replay-step")
def replay_step(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    step: Annotated[str | None, typer.Option(help="A folder in RUN/failed; default: the newest.")] = None,
) -> None:
    """Find the row and the module that made an update of a run not finite."""
    from lrscale.launch.local import run_module

    arguments = [str(run), *(["--step", step] if step else [])]
    raise typer.Exit(run_module("lrscale.stages", ["replay-step", *arguments], say=say))


@app.command()
def generate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run directory, model folder or hub id.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model reads.")],
    arm: Annotated[str | None, typer.Option(help="Which arm of a run; default: latent.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens and latent steps together.")] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Wrap the prompt as a user message.")] = False,
) -> None:
    """Answer one prompt; latent steps are shown as dots."""
    from lrscale.launch.local import run_module
    from lrscale.launch.targets import model_of

    options = [f"--temperature={temperature}", f"--max-new-tokens={max_new_tokens}", f"--seed={seed}"]
    options += ["--chat-template"] if chat_template else []
    model = model_of(target, arm)
    raise typer.Exit(run_module("lrscale.stages", ["generate", *options, "--", model, prompt], say=say))


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


def main() -> None:
    """Entry point: a refusal is one message on stderr and an exit code, never a traceback."""
    sys.exit(_guarded(app))


def _guarded(call: Callable[[], Any]) -> int:
    try:
        call()
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        code = _refusal(error)
        if code is None:
            raise
        say(str(error))
        return code
    return 0


def _refusal(error: Exception) -> int | None:
    """The exit code of an error that is meant for the user, None for a bug of ours."""
    from lrscale.config.errors import RecipeError, RecipeNotFoundError
    from lrscale.launch.errors import ExitCode, LaunchError

    if isinstance(error, LaunchError):
        return error.code
    if isinstance(error, RecipeNotFoundError):
        return ExitCode.NOT_FOUND
    return ExitCode.BAD_RECIPE if isinstance(error, RecipeError) else None


if __name__ == "__main__":
    main()
