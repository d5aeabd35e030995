"""`python -m lrscale.tasks.tiny_base OUT --seed 0`: makes the tiny base that ships with the package.

One thread, so that a seed gives the same bits again on the same machine and library versions. Takes
about ten CPU minutes. Progress goes to stderr, the folder's path to stdout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from lrscale.tasks.tiny_base.make import make_tiny_base
from lrscale.tasks.tiny_base.training import TrainingSettings


def main() -> None:
    """Reads the command line and makes the model."""
    parser = argparse.ArgumentParser(prog="python -m lrscale.tasks.tiny_base", description=__doc__)
    defaults = TrainingSettings()
    parser.add_argument("out", type=Path, help="folder to write; made if it is missing")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--slip-share", type=float, default=defaults.slip_share, help="how careless its teacher is")
    parser.add_argument("--eval-stories", type=int, default=1000, help="stories to measure the accuracies on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True, highlight=False)
    settings = TrainingSettings(seed=arguments.seed, steps=arguments.steps, slip_share=arguments.slip_share)
    figures = make_tiny_base(arguments.out, settings, eval_stories=arguments.eval_stories, report=console.print)
    console.print(figures)
    print(arguments.out)


if __name__ == "__main__":
    main()
