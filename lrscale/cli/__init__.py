"""The command line: parse, call, print; no logic. Everything heavier than Typer is imported inside the commands.

One file a group of commands; importing it puts them into `app`, in the order that `lrscale --help` shows.
"""

# isort: off
from lrscale.cli import launching, plan, runs, models, rewards, doctor, cluster, verification  # noqa: F401 - see above

# isort: on
from lrscale.cli.app import main

__all__ = ["main"]
