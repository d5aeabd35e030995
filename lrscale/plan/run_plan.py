"""Everything that a plan says of one run on one layout, worked out once."""

from __future__ import annotations

from dataclasses import dataclass

from lrscale.config.hardware import Machine
from lrscale.config.recipe import Recipe
from lrscale.plan.checkpoint_bytes import checkpoint_bytes, kept_bytes
from lrscale.plan.fit import Overflow, Suggestion, overflow, suggestions
from lrscale.plan.layout import Layout
from lrscale.plan.memory import memory_plan
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.phases import MemoryPlan
from lrscale.plan.stage_time import StageTimes, stage_times
from lrscale.plan.states import ZeroSettings
from lrscale.plan.step_cost import RunCost, StepTime, run_cost, step_time
from lrscale.plan.step_rates import StepModel
from lrscale.plan.step_time import step_model
from lrscale.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class Activations:
    """GiB a GPU that an update keeps for its backward pass."""

    checkpointed: float
    whole: float


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Memory, time and cost of a run."""

    recipe: Recipe
    dims: ModelDims
    layout: Layout
    machine: Machine
    work: Workload
    zero: ZeroSettings | None
    """Of the DeepSpeed file; None: what the files of ds_configs/ come to."""
    memory: MemoryPlan
    overflow: Overflow | None
    """None where everything fits."""
    suggestions: tuple[Suggestion, ...]
    """Changes with which it would fit; empty where it does, or where none was found."""
    activations: Activations
    rates: StepModel
    step: StepTime
    stages: StageTimes
    cost: RunCost
    checkpoint_gib: float
    disk_gib: float
    """Of all that the run keeps, and the checkpoint being written."""


def plan_run(  # noqa: PLR0913 - everything that decides a plan
    recipe: Recipe,
    dims: ModelDims,
    layout: Layout,
    machine: Machine,
    work: Workload,
    *,
    zero: ZeroSettings | None = None,
    price: float | None = None,
) -> RunPlan:
    """The plan of a run; `price` is a GPU-hour's, in whatever currency.

    Raises:
        LayoutError: the layout is impossible for this model.
    """
    rates = step_model(recipe, dims, layout, machine, work=work)
    memory = memory_plan(recipe, dims, layout, machine, zero)
    over = overflow(memory, recipe)
    step = step_time(rates, work, recipe)
    stages = stage_times(recipe, dims, layout, machine, work, rates)
    ranks = layout.train_gpus
    return RunPlan(
        recipe=recipe,
        dims=dims,
        layout=layout,
        machine=machine,
        work=work,
        zero=zero,
        memory=memory,
        overflow=over,
        activations=_activations(recipe, dims, layout, machine, zero),
        suggestions=tuple(suggestions(recipe, dims, layout, machine, zero)) if over else (),
        rates=rates,
        step=step,
        stages=stages,
        cost=run_cost(step, rates, work, recipe, layout, machine, stages, price),
        checkpoint_gib=checkpoint_bytes(recipe, dims, ranks) / 2**30,
        disk_gib=kept_bytes(recipe, dims, ranks) / 2**30,
    )


def _activations(
    recipe: Recipe, dims: ModelDims, layout: Layout, machine: Machine, zero: ZeroSettings | None
) -> Activations:
    """With and without `model.gradient_checkpointing`, whatever the recipe has."""
    both = (
        recipe.model_copy(update={"model": recipe.model.model_copy(update={"gradient_checkpointing": checkpointing})})
        for checkpointing in (True, False)
    )
    return Activations(*(memory_plan(one, dims, layout, machine, zero).kept_for_backward for one in both))
