"""From a plan and options to a simulation of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lrscale.config.arms import DISCRETE_ARMS
from lrscale.config.errors import Place, Problem, RecipeError
from lrscale.launch.finished_run import MeasuredRun, read_measured
from lrscale.plan.run_plan import RunPlan
from lrscale.plan.simulation.lengths import mean_completion
from lrscale.plan.simulation.planned import Assumptions, PlannedRun
from lrscale.plan.simulation.study import Study, study


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """Options of the command line; None leaves it to the recipe or to an assumption."""

    steps: int | None = None
    seeds: int = 5
    failures_per_node_day: float | None = None
    requeue_s: float | None = None
    reward_s: float | None = None
    lengths_from: Path | None = None
    """A run directory."""


def simulate(plan: RunPlan, options: SimulationOptions, told: Callable[[int, int], None]) -> Study:
    """Runs of the plan; `told` how much is done, and of how much.

    Raises:
        RecipeError: numbers or a layout that cannot be simulated.
        LaunchError: the run that lengths are to come from has none (7).
    """
    measured = read_measured(options.lengths_from) if options.lengths_from is not None else None
    score_s = options.reward_s if options.reward_s is not None or measured is None else measured.score_s
    assumptions = Assumptions(options.steps, options.failures_per_node_day, options.requeue_s, score_s)
    planned = PlannedRun(plan.recipe, plan.dims, plan.machine, plan.work, assumptions)
    try:
        return study(
            planned if measured is None else _measured(planned, measured), plan.layout, seeds=options.seeds, told=told
        )
    except ValueError as error:
        raise RecipeError([Problem(Place("--simulate"), "", str(error))]) from error


def _measured(planned: PlannedRun, run: MeasuredRun) -> PlannedRun:
    """With the lengths of a run: those of the recipe's first arm, and of an arm that reasons the other way."""
    arm = planned.recipe.stages.rl.arms[0]
    discrete = arm in DISCRETE_ARMS
    others = [name for name in run.lengths if (name in DISCRETE_ARMS) != discrete]
    own = run.lengths.get(arm)
    if own is None:
        raise ValueError(
            f"the recipe's arm is {arm}, of which that run has no lengths (it has {', '.join(sorted(run.lengths))}): "
            "name another run, or --set stages.rl.arms=[...]"
        )
    tokens, latents = mean_completion(own)
    lengths = replace(planned.work.lengths, mean=tokens + latents)
    prompt = planned.work.prompt_tokens if run.prompt_tokens is None else run.prompt_tokens
    work = replace(planned.work, lengths=lengths, latent_share=latents / (tokens + latents), prompt_tokens=prompt)
    other = run.lengths[others[0]] if others else None
    return replace(planned, work=work, assumptions=replace(planned.assumptions, lengths=own, other_lengths=other))
