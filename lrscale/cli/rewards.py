"""What can be asked of a reward, without a model and without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrscale.cli.app import Overrides, app, say


@app.command()
def reward(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipe with the task and the reward.")],
    rollouts: Annotated[Path, typer.Option(help="A .jsonl of a run's rollouts folder.")],
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option(min=0, help="Score only so many; 0: all.")] = 0,
) -> None:
    """Score a file of rollouts outside a run: one JSON object a rollout, tracebacks and all."""
    from lrscale.launch.local import run_module
    from lrscale.launch.targets import reward_arguments

    with reward_arguments(recipes, overrides or [], rollouts) as arguments:
        code = run_module("lrscale.stages", ["score", *arguments, f"--limit={limit}"], say=say)
    raise typer.Exit(code)


@app.command("serve-reward")
def serve_reward(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="Python file with a reward function.")],
    name: Annotated[str, typer.Option(help="Function in the file; default: reward, reward_func or reward_fn.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that score.")] = 4,
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=0.001, help="Seconds a sample may take.")] = 60.0,
    memory_mib: Annotated[int, typer.Option("--memory-mib", min=0, help="Of each process; 0: no limit.")] = 8192,
) -> None:
    """Offer a reward function over HTTP (OpenRLHF's contract), so that many nodes share it. Prints the URL."""
    from lrscale.launch.errors import ExitCode, LaunchError
    from lrscale.launch.local import run_module

    if not file.is_file():
        raise LaunchError(f"no such file: {file}", code=ExitCode.NOT_FOUND, help="give a Python file")
    options = [f"--name={name}", f"--host={host}", f"--port={port}", f"--workers={workers}"]
    options += [f"--timeout-s={timeout_s}", f"--memory-mib={memory_mib}"]
    raise typer.Exit(run_module("lrscale.reward.server", [*options, "--", str(file)], say=say))
