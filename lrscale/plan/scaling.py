"""The same run on fewer and on more GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lrscale.config.hardware import Machine
from lrscale.config.recipe import Recipe
from lrscale.plan.fit import overflow
from lrscale.plan.layout import Layout
from lrscale.plan.memory import memory_plan
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.step_cost import step_time
from lrscale.plan.step_time import step_model
from lrscale.plan.workload import Workload

MOST_GPUS = 4096


@dataclass(frozen=True, slots=True)
class ScalePoint:
    """One number of GPUs."""

    gpus: int
    step_s: float
    fits: bool
    """Into their memory."""


def scale_points(
    recipe: Recipe, dims: ModelDims, layout: Layout, machine: Machine, work: Workload
) -> Iterator[ScalePoint]:
    """Halves and doubles of the layout, in its proportion of generating and training nodes, with the same work.

    Up to MOST_GPUS, as far as the sequences of a step divide over the training GPUs.
    """
    for power in range(-12, 13):
        train, generate = _scaled(layout.train_nodes, power), _scaled(layout.rollout_nodes, power)
        if train is None or generate is None:
            continue
        scaled = replace(layout, train_nodes=train, rollout_nodes=generate)
        if scaled.gpus > MOST_GPUS or work.sequences % scaled.train_gpus:
            continue
        rates = step_model(recipe, dims, scaled, machine, work=work)
        fits = overflow(memory_plan(recipe, dims, scaled, machine), recipe) is None
        if rates.cache_positions:
            yield ScalePoint(scaled.gpus, step_time(rates, work, recipe).total, fits)


def _scaled(count: int, power: int) -> int | None:
    """count x 2^power where that is a whole number."""
    if power >= 0:
        return count << power
    return count >> -power if count % (1 << -power) == 0 else None
