"""`python -m lrscale.tasks.tiny_base OUT --seed 0`: makes the tiny base that ships with the package.

One thread, so that a seed gives the same bits again on the same machine and library versions. Takes a
few CPU minutes. Progress goes to stderr, the folder's path to stdout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from lrscale.tasks.tiny_base.make import StopRule, make_tiny_base
from lrscale.tasks.tiny_base.training import TrainingSettings


def main() -> None:
    """Reads the command line and makes the model."""
    parser = argparse.ArgumentParser(prog="python -m lrscale.tasks.tiny_base", description=__doc__)
    defaults = StopRule()
    parser.add_argument("out", type=Path, help="folder to write; made if it is missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accuracy", type=float, default=defaults.accuracy, help="explicit accuracy to stop at")
    parser.add_argument("--max-steps", type=int, default=defaults.max_steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True, highlight=False)
    stop = StopRule(accuracy=arguments.accuracy, max_steps=arguments.max_steps)
    figures = make_tiny_base(arguments.out, TrainingSettings(seed=arguments.seed), stop, console.print)
    console.print(figures)
    print(arguments.out)


if __name__ == "__main__":
    main()
