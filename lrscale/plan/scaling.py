"""The same run on fewer and on more GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lrscale.plan.fit import overflow
from lrscale.plan.layout import Layout
from lrscale.plan.memory import memory_plan
from lrscale.plan.run_plan import RunPlan
from lrscale.plan.step_cost import step_time
from lrscale.plan.step_time import step_model

MOST_GPUS = 4096
_GAPS = 16
"""Into which a logarithmic axis is cut; no two points are nearer to each other than one of them."""


@dataclass(frozen=True, slots=True)
class ScalePoint:
    """One number of GPUs."""

    gpus: int
    step_s: float
    fits: bool
    """Into their memory."""


def scale_points(plan: RunPlan) -> Iterator[ScalePoint]:
    """The planned layout, and the same with fewer and with more nodes, with the same work.

    Numbers of nodes whose engines hold no sequence are left out, other than the planned one.
    """
    recipe, dims, machine = plan.recipe, plan.dims, plan.machine
    for layout in _thinned(list(_layouts(plan)), plan.layout):
        rates = step_model(recipe, dims, layout, machine, work=plan.work)
        over = overflow(memory_plan(recipe, dims, layout, machine, plan.zero), recipe)
        if rates.cache_positions or layout == plan.layout:
            yield ScalePoint(layout.gpus, step_time(rates, plan.work, recipe).total, over is None)


def _layouts(plan: RunPlan) -> Iterator[Layout]:
    """Up to MOST_GPUS, in the plan's proportion of generating and training nodes, itself among them.

    The sequences of a step divide over the training GPUs.
    """
    own = plan.layout
    parts = math.gcd(own.train_nodes, own.rollout_nodes)
    train, generate = own.train_nodes // parts, own.rollout_nodes // parts
    single = plan.recipe.parallel.kind == "single"  # one process, on however many nodes
    for times in range(1, max(parts, MOST_GPUS * parts // own.gpus) + 1):
        layout = own if times == parts else own.resized(train_nodes=times * train, rollout_nodes=times * generate)
        divides = plan.work.sequences % layout.train_gpus == 0
        if layout == own or (divides and not single):
            yield layout


def _thinned(layouts: Sequence[Layout], own: Layout) -> list[Layout]:
    """Those that stand apart on a logarithmic axis, outwards from `own`."""
    apart = (layouts[-1].gpus / layouts[0].gpus) ** (1 / _GAPS)
    at = layouts.index(own)
    below, above = [own], [own]
    for layout in reversed(layouts[:at]):
        if below[-1].gpus >= apart * layout.gpus:
            below.append(layout)
    for layout in layouts[at + 1 :]:
        if layout.gpus >= apart * above[-1].gpus:
            above.append(layout)
    return [*reversed(below), *above[1:]]
