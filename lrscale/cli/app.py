"""What the commands share: the Typer application, its options, and how a refusal becomes an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
