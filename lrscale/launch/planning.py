"""From a loaded recipe and options to its plan, with errors that point at what has to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrscale.config.errors import Place, Problem, RecipeError
from lrscale.config.hardware import Machine
from lrscale.config.load import LoadedRecipe
from lrscale.config.recipe import Recipe
from lrscale.launch.finished_run import MeasuredRun
from lrscale.launch.job import planned_recipe, require_dims, require_positions
from lrscale.launch.on_slurm import batch_of
from lrscale.plan.layout import EngineKind, LayoutError, layout_of
from lrscale.plan.run_plan import RunPlan, plan_run
from lrscale.plan.topology import longest_prompt
from lrscale.plan.workload import workload


def plan_of(  # noqa: PLR0913 - options of the command line
    loaded: LoadedRecipe,
    machine: Machine,
    *,
    engine: EngineKind | None = None,
    rollout_nodes: int | None = None,
    tensor_parallel: int | None = None,
    one_step_off: bool = False,
    lengths: Mapping[str, float] | None = None,
    measured: MeasuredRun | None = None,
    scoring_s: float | None = None,
    price: float | None = None,
) -> RunPlan:
    """The plan of a recipe.

    Args:
        loaded: The recipe; where it does not say cluster.gpu_memory_gib, a GPU has the machine's.
        machine: Where it runs.
        engine: None leaves it to the recipe; so do `rollout_nodes` and `tensor_parallel`.
        rollout_nodes: Nodes that only generate.
        tensor_parallel: GPUs an engine.
        one_step_off: Generate while training.
        lengths: `prompt_tokens`, `mean_new_tokens`, `spread`, `latent_share`, as far as they are known.
        measured: A run that went before, whose lengths are those of this one.
        scoring_s: Mean of a score; None: as measured, or assumed.
        price: Of a GPU-hour.

    Raises:
        RecipeError: the model's dimensions are not known or its positions too few, or batch, lengths or layout are
            impossible.
        LaunchError: the measured run had none of the recipe's arms (7).
    """
    known: dict[str, Any] = dict(lengths or {})
    _require_lengths(loaded.recipe, known)
    dims = require_dims(loaded)
    require_positions(loaded, dims)
    batch_of(loaded)
    recipe, zero = planned_recipe(loaded, dims)
    if "gpu_memory_gib" not in recipe.cluster.model_fields_set:
        recipe = recipe.model_copy(
            update={"cluster": recipe.cluster.model_copy(update={"gpu_memory_gib": machine.gpu.memory_gib})}
        )
    layout = layout_of(
        recipe,
        engine=engine,
        rollout_nodes=rollout_nodes,
        tensor_parallel=tensor_parallel,
        one_step_off=one_step_off,
    )
    if measured is not None:
        known |= measured.known(recipe.stages.rl.arms)
        scoring_s = measured.score_s if scoring_s is None else scoring_s
    work = workload(recipe, machine, scoring_s=scoring_s, **known)
    try:
        return plan_run(recipe, dims, layout, machine, work, zero=zero, price=price)
    except LayoutError as error:
        raise RecipeError([Problem(Place(error.option), "", str(error))]) from error


def _require_lengths(recipe: Recipe, lengths: Mapping[str, float]) -> None:
    """Raises RecipeError for means above what the recipe lets a sequence become."""
    limits = {
        "mean_new_tokens": ("rollout.max_new_tokens", recipe.rollout.max_new_tokens),
        "prompt_tokens": ("task.max_prompt_tokens", longest_prompt(recipe)),
    }
    for name, (key, limit) in limits.items():
        if limit and lengths.get(name, 0) > limit:
            option = f"--{name.replace('_', '-')}"
            message = f"{option} {lengths[name]:g} is above {key}, which is {limit}: no mean is above the limit"
            raise RecipeError([Problem(Place(option), "", message, f"lower it, or raise --set {key}=...")])
