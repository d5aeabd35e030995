"""What `lrscale plan` does beyond arithmetic: simulate the run, and draw the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrscale.cli.app import say
from lrscale.cli.number import number

if TYPE_CHECKING:
    from lrscale.config.hardware import Machine
    from lrscale.config.recipe import Recipe
    from lrscale.launch.finished_run import MeasuredRun
    from lrscale.launch.simulating import SimulationOptions
    from lrscale.plan.run_plan import RunPlan
    from lrscale.plan.simulation.study import Study

Simulate = Annotated[
    bool, typer.Option("--simulate", help="Simulate the whole run: failures, queues, scoring, lengths.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="With --simulate: RL steps it has; default: the recipe's.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="With --simulate: how many runs; default: 5.")]
FailuresPerNodeDay = Annotated[
    float | None,
    number("--failures-per-node-day", help="With --simulate; default: Llama 3's, 0.0038."),
]
RequeueS = Annotated[float | None, number("--requeue-s", help="With --simulate: seconds in the queue after a failure.")]
LengthsFrom = Annotated[
    Path | None, typer.Option("--lengths-from", metavar="RUN", help="A run whose lengths and scoring times to take.")
]
Charts = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Write charts (PNG) and plan.json there; a run's report shows those of its folder."
    ),
]


def refuse_without_simulation(**options: float | None) -> None:
    """Raises LaunchError for options that only a simulation reads: without one they would change nothing."""
    from lrscale.launch.errors import ExitCode, LaunchError

    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise LaunchError(
            f"{', '.join(given)}: read by the simulation alone", code=ExitCode.USAGE, help="add --simulate"
        )


def lengths_of(run: Path, recipe: Recipe, machine: Machine, told: Mapping[str, float]) -> MeasuredRun:
    """What a run that went before tells. Raises LaunchError where options say the same, or the run has no lengths."""
    from lrscale.launch.errors import ExitCode, LaunchError
    from lrscale.launch.finished_run import read_measured

    if told:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in told)
        raise LaunchError(
            f"--lengths-from and {options} both say how long sequences are",
            code=ExitCode.USAGE,
            help="leave one out",
        )
    return read_measured(run, recipe.rollout.max_new_tokens, machine.sequences.length_spread.value)


def simulated(plan: RunPlan, options: SimulationOptions, measured: MeasuredRun | None) -> Study:
    """The simulation, with its progress on stderr."""
    from lrscale.launch.simulating import simulate
    from lrscale.report.timing import StageProgress

    with StageProgress("simulate", 100, unit="%") as progress:
        shown = 0

        def told(done: int, total: int) -> None:
            nonlocal shown
            percent = 100 * done // total
            if percent > shown:
                progress.advance(percent - shown)
                shown = percent

        return simulate(plan, options, told, measured)


def draw(plan: RunPlan, simulation: dict[str, Any] | None, folder: Path) -> None:
    """plan.json, and where matplotlib is there the charts; prints their paths."""
    from lrscale.launch.errors import ExitCode, LaunchError
    from lrscale.launch.plan_file import keep_plan
    from lrscale.plan.run_file import charted_values
    from lrscale.report.charts import ChartsMissing
    from lrscale.report.plan_charts import write_plan_charts

    values = charted_values(plan, simulation)
    say(str(keep_plan(folder, values)))
    try:
        for path in write_plan_charts(values, folder, plan.recipe.name):
            say(str(path))
    except ChartsMissing as error:
        raise LaunchError(str(error), code=ExitCode.USAGE, help="plan.json is there all the same") from error
