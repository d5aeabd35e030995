"""The command line: parse, call, print; no logic. Everything heavier than Typer is imported inside the commands.

One file a group of commands; importing it puts them into `app`, in the order that `lrscale --help` shows.
"""

from lrscale.cli import launching, models, rewards, runs  # noqa: F401 - the commands put themselves into the application
from lrscale.cli.app import main

__all__ = ["main"]
