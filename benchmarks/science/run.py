"""The effect at tiny scale: every arm, several seeds. `python -m benchmarks.science.run` prints the table and draws it.

One run of launchers/tiny-cpu.yaml a seed, through the command line as a user would start it: arms from the same base
and projector, with equal settings. Each seed has stories of its own, so none of those it is judged on was used to
choose anything (settings were chosen on other seeds, see LOG.md). After the runs, each arm's model answers stories
that are longer than any it has met. Finished runs are kept and not run again; an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.science.figures import ArmFigures, arm_figures, verdicts
from benchmarks.science.scatter import draw_scatter

RECIPE = "tiny-cpu"
ARMS = "stages.rl.arms=[discrete_free, discrete, latent_free, latent, zero_latent, shuffled_latent]"
"""The demo's arms, and the two that tell what the price of length does by itself."""
LONGER = "task.events=[9, 10]"
"""Training stories have 6 to 8 events."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/science"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to lrscale launch")
    parser.add_argument("--longer", action=argparse.BooleanOptionalAction, default=True, help="test on longer stories")
    parser.add_argument("--print-only", action="store_true", help="the table of what is there; nothing is run")
    options = parser.parse_args()
    runs = [options.runs_dir / f"seed-{seed}" for seed in options.seeds]
    if not options.print_only:
        for seed, run in zip(options.seeds, runs, strict=True):
            code = launch(run, [f"seed={seed}", ARMS, *options.set])
            if code:
                return code
            if options.longer and not (run / "longer.json").is_file():
                evaluate_longer(run)
    report(runs, Console(width=170, highlight=False), options.runs_dir / "science.png")
    return 0


def launch(run: Path, overrides: list[str]) -> int:
    """One seed, or what is left of it; lrscale's exit code."""
    command = [sys.executable, "-m", "lrscale", "launch", RECIPE, "--runs-dir", str(run.parent), "--name", run.name]
    for override in overrides:
        command += ["--set", override]
    return subprocess.run(command, check=False).returncode


def evaluate_longer(run: Path) -> None:
    """All arms of a finished run on longer stories, into RUN/longer.json."""
    command = [sys.executable, "-m", "lrscale", "evaluate", str(run), "--set", LONGER]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    (run / "longer.json").write_text(json.dumps([json.loads(line) for line in done.stdout.splitlines()], indent=1))


def report(runs: list[Path], console: Console, chart: Path) -> None:
    """Every arm of every seed, the verdicts over the seeds, and the chart."""
    figures = [figure for run in runs for figure in arm_figures(run)]
    console.print(arms_table(figures))
    for line in verdicts(figures):
        console.print(line)
    draw_scatter(figures, chart)
    console.print(f"chart: {chart}")


def arms_table(figures: list[ArmFigures]) -> Table:
    table = Table("arm", "seed", box=None)
    for name in (
        "accuracy before, %",
        "accuracy after, % [95 %]",
        "tokens",
        "latent steps",
        "positions",
        "longer stories, %",
        "RL tokens",
        "CPU minutes",
    ):
        table.add_column(name, justify="right")
    for arm in dict.fromkeys(figure.arm for figure in figures):
        of_arm = [figure for figure in figures if figure.arm == arm]
        for figure in of_arm:
            table.add_row(*figure.cells())
        if len(of_arm) > 1:
            table.add_row(*ArmFigures.mean_cells(of_arm), end_section=True, style="bold")
    return table


if __name__ == "__main__":
    sys.exit(main())
