"""From a loaded recipe and options to its plan, with errors that point at what has to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrscale.config.errors import Place, Problem, RecipeError
from lrscale.config.hardware import Machine
from lrscale.config.load import LoadedRecipe
from lrscale.launch.job import ds_config, require_dims
from lrscale.launch.on_slurm import batch_of
from lrscale.plan.layout import EngineKind, LayoutError, layout_of
from lrscale.plan.run_plan import RunPlan, plan_run
from lrscale.plan.states import zero_settings
from lrscale.plan.step_cost import SCORING_S
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
    scoring_s: float = SCORING_S,
    price: float | None = None,
) -> RunPlan:
    """The plan of a recipe.

    Args:
        loaded: The recipe; the GPU's memory is in it (cluster.gpu_memory_gib).
        machine: Where it runs.
        engine: None leaves it to the recipe; so do `rollout_nodes` and `tensor_parallel`.
        rollout_nodes: Nodes that only generate.
        tensor_parallel: GPUs an engine.
        one_step_off: Generate while training.
        lengths: `prompt_tokens`, `mean_new_tokens`, `spread`, `latent_share`, as far as they are known.
        scoring_s: From the end of the last sequence to its score.
        price: Of a GPU-hour.

    Raises:
        RecipeError: the model's dimensions are not known, or batch or layout are impossible.
    """
    recipe = loaded.recipe
    dims = require_dims(loaded)
    batch_of(loaded)
    zero = zero_settings(dims.hidden, ds_config(loaded)) if recipe.parallel.kind == "zero3" else None
    layout = layout_of(
        recipe,
        engine=engine,
        rollout_nodes=rollout_nodes,
        tensor_parallel=tensor_parallel,
        one_step_off=one_step_off,
    )
    known: dict[str, Any] = dict(lengths or {})
    try:
        return plan_run(
            recipe, dims, layout, machine, workload(recipe, **known), zero=zero, scoring_s=scoring_s, price=price
        )
    except LayoutError as error:
        raise RecipeError([Problem(Place(error.option), "", str(error))]) from error
