"""From a plan and options to a simulation of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lrscale.config.errors import Place, Problem, RecipeError
from lrscale.launch.finished_run import MeasuredRun
from lrscale.plan.run_plan import RunPlan
from lrscale.plan.simulation.planned import Assumptions, PlannedRun
from lrscale.plan.simulation.study import Study, study


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """Options of the command line; None leaves it to the recipe or to an assumption."""

    steps: int | None = None
    seeds: int | None = None
    failures_per_node_day: float | None = None
    requeue_s: float | None = None
    price: float | None = None
    """Of a GPU-hour."""


def simulate(
    plan: RunPlan,
    options: SimulationOptions,
    told: Callable[[int, int], None] = lambda done, total: None,
    measured: MeasuredRun | None = None,
) -> Study:
    """Runs of the plan.

    Args:
        plan: Its work is that of `measured`, where there is one.
        options: What the command line says.
        told: Told how much is done, and of how much.
        measured: A run that went before, to draw lengths from.

    Raises:
        RecipeError: numbers or a layout that cannot be simulated.
        LaunchError: the measured run had none of the recipe's arms (7).
    """
    assumptions = Assumptions(options.steps, options.failures_per_node_day, options.requeue_s)
    if measured is not None:
        arm = measured.arm(plan.recipe.stages.rl.arms)
        lengths, other = measured.lengths[arm], measured.other_than(arm)
        assumptions = replace(assumptions, lengths=lengths, other_lengths=other)
    planned = PlannedRun(plan.recipe, plan.dims, plan.machine, plan.work, assumptions, plan.zero)
    seeds = {} if options.seeds is None else {"seeds": options.seeds}
    try:
        return study(planned, plan.layout, price=options.price, told=told, **seeds)
    except ValueError as error:
        raise RecipeError([Problem(Place("--simulate"), "", str(error))]) from error
