"""The plan of a run, as people read it before anything is submitted, and as numbers for scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lrscale.config.recipe import Recipe
from lrscale.plan.duration import duration_s
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.phases import MemoryPlan
from lrscale.plan.topology import BatchPlan, Topology, topology


def plan_values(
    recipe: Recipe, dims: ModelDims | None, batch: BatchPlan | None, memory: MemoryPlan | None
) -> dict[str, Any]:
    """The numbers; None where they are not known."""
    there = topology(recipe)
    return {
        "nodes": there.nodes,
        "ranks_per_node": there.ranks_per_node,
        "ranks": there.world_size,
        "gpus": there.gpus,
        "roles": {"train": there.nodes, **dict(there.roles)},
        "parameters": dims.parameters if dims else None,
        "batch": asdict(batch) if batch else None,
        "gpu_gib": {"peak": memory.peak, "phases": phase_values(memory)} if memory and there.gpus else None,
        "host_gib_per_node": memory.host_per_node if memory else None,
        "gpu_hours": gpu_hours(recipe),
    }


def plan_lines(
    recipe: Recipe, dims: ModelDims | None, batch: BatchPlan | None, memory: MemoryPlan | None
) -> Iterator[str]:
    """The same in words, a line a subject."""
    there, cluster = topology(recipe), recipe.cluster
    yield f"model     {recipe.model.path}{_size(recipe, dims)}, {recipe.model.dtype}"
    where = f" of partition {cluster.partition}" if cluster.partition else ""
    gpus = f", {there.gpus_per_node} GPUs each" if there.gpus_per_node else ", CPUs only"
    yield f"nodes     {there.nodes + there.other_nodes}{where}{gpus}"
    yield f"ranks     {there.nodes} x {there.ranks_per_node} = {there.world_size} ({recipe.parallel.kind}{_gather(recipe)})"
    if there.roles:
        yield (
            "roles     "
            + ", ".join(f"{name} {count}" for name, count in (("train", there.nodes), *there.roles))
            + " nodes"
        )
    if batch is not None:
        yield _batch(batch)
    yield from _memory(recipe, there, memory)
    yield _time(recipe)


def phase_values(memory: MemoryPlan) -> dict[str, dict[str, float]]:
    """GiB a GPU of every phase, by what they are for."""
    return {phase.name: {"total": phase.total, **dict(phase.parts)} for phase in memory.phases}


def gpu_hours(recipe: Recipe) -> float | None:
    """Of one pass through the queue, at most; None without a time limit or without GPUs."""
    limit, gpus = recipe.cluster.time_limit, topology(recipe).gpus
    return duration_s(limit) / 3600 * gpus if limit is not None and gpus else None


def _size(recipe: Recipe, dims: ModelDims | None) -> str:
    if dims is None:
        return " (not on this machine: memory cannot be planned)"
    projector = dims.projector_parameters(recipe.projector.layers, recipe.projector.kind)
    return f", {count(dims.parameters)} parameters and {count(projector)} of the projector"


def _gather(recipe: Recipe) -> str:
    return "" if recipe.parallel.kind == "single" else f", decoding {recipe.parallel.gather.replace('_', ' ')}"


def _batch(batch: BatchPlan) -> str:
    updates = f", {batch.updates} updates a step" if batch.updates > 1 else ""
    return (
        f"batch     micro {batch.micro} x accumulation {batch.accumulation} x ranks {batch.ranks} = {batch.sequences} "
        f"sequences{updates}"
    )


def _memory(recipe: Recipe, there: Topology, memory: MemoryPlan | None) -> Iterator[str]:
    if memory is None:
        return
    if there.gpus:
        limit, largest = recipe.cluster.gpu_memory_gib, memory.largest
        verdict = "fits" if memory.peak <= limit else "may not fit: `lrscale plan` says with which changes it would"
        shown = ", ".join(f"{name} {size:.1f}" for name, size in largest.parts if size >= 0.05)
        yield f"memory    about {memory.peak:.0f} of {limit:g} GiB a GPU ({largest.name}): {verdict} ({shown})"
    yield f"host      about {memory.host_per_node:.1f} GiB of memory a node at most ({memory.host_largest.name})"


def _time(recipe: Recipe) -> str:
    cluster, hours = recipe.cluster, gpu_hours(recipe)
    limit = f"at most {cluster.time_limit}" if cluster.time_limit else "the partition's limit"
    cost = f", {hours:,.0f} GPU-hours" if hours is not None else ""
    return (
        f"time      {limit}{cost} each time; saves {cluster.drain_s} s before, then back into the queue, "
        f"{cluster.max_restarts} times at most"
    )


def count(number: int) -> str:
    """With a letter for its size: 70.55 B."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return str(number)


def size(gib: float) -> str:
    """In the unit that suits it: 947.5 GiB, 12.3 MiB."""
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{1024 * gib:,.1f} MiB"


def amount(number: float) -> str:
    """Small ones with two digits, large ones without a fraction: 0.042, 7.5, 61.6, 3,943."""
    if number < 10:
        return f"{number:.2g}"
    return f"{number:,.1f}" if number < 100 else f"{number:,.0f}"


def every(steps: int) -> str:
    """`every step`, `every 6 steps`."""
    return "every step" if steps == 1 else f"every {steps} steps"


def span(seconds: float) -> str:
    """`8.4 s`, `3.1 min`, `2.5 h`, `11 days`."""
    if math.isinf(seconds):
        return "never"
    for size, unit in ((86400 * 3, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            value = seconds / (86400 if unit == "days" else size)
            return f"{value:.3g} {unit}"
    return f"{seconds:.3g} s"


def counted(number: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
