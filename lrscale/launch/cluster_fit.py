"""Whether a run fits the cluster that SLURM describes: partition, nodes, time limit, GPUs, CPUs, memory."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from lrscale.config.errors import Place, Problem, RecipeError
from lrscale.config.load import LoadedRecipe
from lrscale.config.recipe import Recipe
from lrscale.launch.slurm import Partition
from lrscale.plan.duration import duration_s
from lrscale.plan.phases import MemoryPlan
from lrscale.plan.topology import topology


class Misfit(NamedTuple):
    """A finding without its place."""

    key: str
    message: str
    help: str


def require_fit(loaded: LoadedRecipe, partitions: Mapping[str, Partition], memory: MemoryPlan | None) -> None:
    """Raises RecipeError with everything in the recipe that is beyond the cluster's limits.

    Args:
        loaded: The recipe, and where its values stand.
        partitions: As SLURM lists them.
        memory: What the run needs; None where the model is not known.
    """
    found = list(_misfits(loaded.recipe, partitions, memory))
    if found:
        raise RecipeError([_located(loaded, misfit) for misfit in found])


def require_sound(loaded: LoadedRecipe, memory: MemoryPlan | None) -> None:
    """Raises RecipeError with what no cluster could run: no time left to save in, states larger than a GPU."""
    found = list(_unsound(loaded.recipe, memory))
    if found:
        raise RecipeError([_located(loaded, misfit) for misfit in found])


def _unsound(recipe: Recipe, memory: MemoryPlan | None) -> Iterator[Misfit]:
    cluster = recipe.cluster
    if cluster.time_limit is not None and duration_s(cluster.time_limit) <= cluster.drain_s:
        yield Misfit(
            "cluster.drain_s",
            f"cluster.drain_s is {cluster.drain_s}, all of the time limit ({cluster.time_limit}): the run would be asked "
            "to save as soon as it starts",
            "give a longer --time, or a smaller cluster.drain_s",
        )
    if memory is not None and topology(recipe).gpus_per_node and memory.states > cluster.gpu_memory_gib:
        yield Misfit(
            "cluster.nodes",
            f"weights, gradients and optimizer states alone take {memory.states:.0f} GiB a GPU on "
            f"{topology(recipe).world_size} ranks, a GPU has {cluster.gpu_memory_gib:g} (cluster.gpu_memory_gib)",
            "give more nodes, or parallel.offload_optimizer: true",
        )


def _misfits(recipe: Recipe, partitions: Mapping[str, Partition], memory: MemoryPlan | None) -> Iterator[Misfit]:
    chosen = recipe.cluster.partition
    if chosen is None:
        partition = next((one for one in partitions.values() if one.default), None)
        if partition is None:
            help_ = f"--partition {' or --partition '.join(partitions)}"
            yield Misfit("cluster.partition", "no partition is named, and the cluster has no default one", help_)
            return
        yield from _limits(recipe, partition, partitions, memory)
        return
    for name in chosen.split(","):  # SLURM takes whichever starts first
        if name not in partitions:
            near = difflib.get_close_matches(name, partitions, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            there = f"{hint}partitions: {', '.join(partitions)}"
            yield Misfit("cluster.partition", f"the cluster has no partition {name!r}", there)
        else:
            yield from _limits(recipe, partitions[name], partitions, memory)


def _limits(
    recipe: Recipe, partition: Partition, partitions: Mapping[str, Partition], memory: MemoryPlan | None
) -> Iterator[Misfit]:
    cluster, there, name = recipe.cluster, topology(recipe), partition.name
    if not partition.up:
        yield Misfit("cluster.partition", f"partition {name!r} is down", _elsewhere(partitions, lambda one: one.up))
    nodes = there.nodes + there.other_nodes
    most = min(partition.nodes, partition.max_nodes or partition.nodes)
    if nodes > most:
        yield Misfit(
            "cluster.nodes",
            f"partition {name!r} allows {most} nodes, {nodes} requested",
            _or(f"--nodes {most - there.other_nodes}", partitions, lambda one: one.nodes >= nodes),
        )
    wanted_s = duration_s(cluster.time_limit) if cluster.time_limit else 0
    if partition.max_time_s is not None and wanted_s > partition.max_time_s:
        limit = _clock(partition.max_time_s)
        yield Misfit(
            "cluster.time_limit",
            f"partition {name!r} allows {limit}, {cluster.time_limit} requested",
            _or(f"--time {limit} (the run saves and goes back into the queue by itself)", partitions,
                lambda one: one.max_time_s is None or one.max_time_s >= wanted_s),
        )  # fmt: skip
    gpus = there.gpus_per_node if cluster.gpu_directive != "none" else 0
    if gpus > partition.gpus_per_node:
        yield Misfit(
            "cluster.gpus_per_node",
            f"nodes of partition {name!r} have {partition.gpus_per_node} GPUs, {gpus} requested",
            _or(f"--set cluster.gpus_per_node={partition.gpus_per_node}" if partition.gpus_per_node else "", partitions,
                lambda one: one.gpus_per_node >= gpus),
        )  # fmt: skip
    cpus = (cluster.cpus_per_rank or 0) * there.ranks_per_node
    if cpus > partition.cpus_per_node:
        most_cpus = partition.cpus_per_node // there.ranks_per_node
        yield Misfit(
            "cluster.cpus_per_rank",
            f"nodes of partition {name!r} have {partition.cpus_per_node} CPUs, {cpus} requested "
            f"({cluster.cpus_per_rank} for each of {there.ranks_per_node} ranks)",
            _or(f"--set cluster.cpus_per_rank={most_cpus}" if most_cpus else "", partitions,
                lambda one: one.cpus_per_node >= cpus),
        )  # fmt: skip
    asked_mib = cluster.memory_mib
    if asked_mib > partition.memory_mib:
        yield Misfit(
            "cluster.memory",
            f"nodes of partition {name!r} have {partition.memory_mib} MiB of memory, {cluster.memory} requested",
            _or(f"--set cluster.memory={partition.memory_mib}M", partitions, lambda one: one.memory_mib >= asked_mib),
        )
    has_gib = (asked_mib or partition.memory_mib) / 1024
    if memory is not None and memory.host_per_node > has_gib:
        needed = memory.host_per_node
        yield Misfit(
            "cluster.memory" if asked_mib else "cluster.nodes",
            f"the run takes about {needed:.0f} GiB of host memory a node ({memory.host_largest.name}), a node of partition "
            f"{name!r} has {has_gib:.0f}" + (" for this job" if asked_mib else ""),
            _or("give more nodes", partitions, lambda one: one.memory_mib / 1024 >= needed),
        )


def _or(first: str, partitions: Mapping[str, Partition], fits: Callable[[Partition], bool]) -> str:
    other = _elsewhere(partitions, fits)
    return ", or ".join(words for words in (first, other) if words)


def _elsewhere(partitions: Mapping[str, Partition], fits: Callable[[Partition], bool]) -> str:
    """The first partition that would do, as an option."""
    one = next((one for one in partitions.values() if one.up and fits(one)), None)
    return f"--partition {one.name} ({one.nodes} nodes)" if one is not None else ""


def _clock(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    return (f"{days}-" if days else "") + f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"


def _located(loaded: LoadedRecipe, misfit: Misfit) -> Problem:
    return Problem(loaded.places.get(misfit.key, Place("defaults")), misfit.key, misfit.message, misfit.help)
