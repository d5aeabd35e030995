"""Whether a run fits its GPUs, what runs out first, and the smallest change with which it fits.

Suggestions are tried, not guessed: each is the recipe or layout with the change in it, planned again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lrscale.config.base import Section
from lrscale.config.hardware import Machine
from lrscale.config.recipe import Recipe
from lrscale.plan.layout import Layout, LayoutError, require_layout
from lrscale.plan.memory import memory_plan
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.phases import MemoryPlan, Phase
from lrscale.plan.states import ZeroSettings
from lrscale.plan.topology import dividing_nodes, longest_prompt, longest_sequence

_MOST_NODES = 64
_SUGGESTIONS = 4
_ROUNDING = 0.01
"""GiB; an engine's cache takes what there is, to the last byte."""
_ENGINE_SHARES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Of a GPU's memory that are tried."""


@dataclass(frozen=True, slots=True)
class Overflow:
    """What does not fit, and where it does not first."""

    phase: Phase
    part: str
    """Its largest part."""
    needed: float
    limit: float
    """GiB that a GPU has, or the host of a node."""
    host: bool = False
    """Whether it is the host's memory that is too small."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something that may be altered, by itself or with others."""

    options: tuple[str, ...]
    """As they are written on the command line: `--set a.b=c`, `--nodes 8`."""
    recipe: Recipe
    layout: Layout


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change with which everything fits."""

    options: tuple[str, ...]
    peak: float
    """GiB a GPU then."""
    host: float
    """GiB of host memory a node then."""


def overflow(plan: MemoryPlan, recipe: Recipe) -> Overflow | None:
    """The first phase, in the order of time, that needs more than a GPU has (cluster.gpu_memory_gib), or than a node may
    use (cluster.memory, where it is given); None where all fit."""
    limit, host = recipe.cluster.gpu_memory_gib, recipe.cluster.memory_mib / 1024
    for phase in plan.phases:
        if phase.total > limit + _ROUNDING:
            return Overflow(phase, max(phase.parts, key=lambda part: part[1])[0], phase.total, limit)
        if 0 < host < phase.host:
            return Overflow(phase, "host memory", phase.host, host, host=True)
    return None


def suggestions(
    recipe: Recipe, dims: ModelDims, layout: Layout, machine: Machine, zero: ZeroSettings | None = None
) -> list[Suggestion]:
    """The smallest changes that make everything fit: single ones, then two at a time, then one with more machines.

    Cheap ones come first: what costs time only, then what changes the run, then more machines.
    """
    found: list[Suggestion] = []
    for changes in _rounds(Change((), recipe, layout)):
        for change in _possible(changes, dims):
            plan = memory_plan(change.recipe, dims, change.layout, machine, zero)
            if overflow(plan, change.recipe) is None:
                found.append(Suggestion(change.options, plan.peak, plan.host_per_node))
        if any(one.options[0].startswith("--set") for one in found):
            break  # else ways that need no other machines are looked for in the next round
    return _distinct(found)[:_SUGGESTIONS]


def _distinct(found: list[Suggestion]) -> list[Suggestion]:
    """Of several values of the same keys the first, which is the mildest; nothing that another one makes needless."""
    kept: dict[tuple[str, ...], Suggestion] = {}
    for one in found:
        if not any(set(other.options) < set(one.options) for other in found):
            kept.setdefault(tuple(_key(option) for option in one.options), one)
    return list(kept.values())


def _rounds(start: Change) -> Iterator[Iterable[Change]]:
    """Single changes; pairs of such that need no other machines; one of these with other machines."""
    singles = list(_single(start))
    here = [change for change in singles if change.options[0].startswith("--set")]
    kinds = [_kind(change) for change in here]
    yield singles
    yield (
        both
        for one in here
        for both in _single(one)
        if _kind(both) in kinds[kinds.index(_kind(one)) + kinds.count(_kind(one)) :]
    )
    yield (both for one in here for both in _larger(one))


def _kind(change: Change) -> str:
    """What its newest option alters."""
    return _key(change.options[-1])


def _key(option: str) -> str:
    """An option without its value."""
    return option.partition("=")[0].rstrip("0123456789")


def _possible(changes: Iterable[Change], dims: ModelDims) -> Iterator[Change]:
    """Those whose layout the model allows."""
    for change in changes:
        try:
            require_layout(change.layout, dims)
        except LayoutError:
            continue
        yield change


def _single(start: Change) -> Iterator[Change]:
    yield from _slower(start)
    yield from _smaller(start)
    yield from _larger(start)


def _slower(start: Change) -> Iterator[Change]:
    """The same run, with more time and fewer bytes."""
    recipe = start.recipe
    if not recipe.model.gradient_checkpointing:
        yield _set(start, "model.gradient_checkpointing", True)
    tokens, longest = recipe.optimisation.micro_batch_tokens, longest_sequence(recipe)
    while tokens > longest:
        tokens = max(longest, tokens // 2)
        yield _set(start, "optimisation.micro_batch_tokens", tokens)
    if recipe.rollout.kind == "vllm":
        for share in _ENGINE_SHARES:
            if share < recipe.rollout.engine_memory_share:
                yield _set(start, "rollout.gpu_memory_share", share)
    rows = recipe.rollout.batch_rows
    while rows > 1:
        rows //= 2
        yield _set(start, "rollout.batch_rows", rows)
    yield from _elsewhere(start)


def _elsewhere(start: Change) -> Iterator[Change]:
    """Weights and states on the shards they come from, or in host memory."""
    parallel = start.recipe.parallel
    if parallel.kind != "single" and parallel.gather != "per_layer":
        yield _set(start, "parallel.gather", "per_layer")
    if parallel.kind == "zero3":
        for name in ("offload_between_phases", "offload_optimizer", "offload_parameters"):
            if not getattr(parallel, name):
                yield _set(start, f"parallel.{name}", True)


def _smaller(start: Change) -> Iterator[Change]:
    """Another run: shorter sequences."""
    recipe = start.recipe
    yield _set(start, "rollout.max_new_tokens", max(1, recipe.rollout.max_new_tokens // 2))
    if longest_prompt(recipe):
        yield _set(start, "task.max_prompt_tokens", max(1, longest_prompt(recipe) // 2))


def _larger(start: Change) -> Iterator[Change]:
    """More machines, or another way of sharing them out."""
    layout = start.layout
    if start.recipe.parallel.kind == "single" and layout.gpus_per_node * layout.nodes == 1:
        return
    trainer = start.recipe
    while above := [nodes for nodes in dividing_nodes(trainer) if trainer.cluster.nodes < nodes <= _MOST_NODES]:
        trainer = _with(trainer, ("cluster", "nodes"), above[0])
        yield Change((*start.options, f"--nodes {above[0]}"), trainer, layout.resized(train_nodes=above[0]))
    if layout.engine == "vllm":
        wider = layout.tensor_parallel * 2
        if wider <= layout.gpus_per_node:
            yield Change(
                (*start.options, f"--tensor-parallel {wider}"), start.recipe, layout.resized(tensor_parallel=wider)
            )
        if layout.colocated:
            split = layout.resized(rollout_nodes=max(1, layout.train_nodes // 2))
            yield Change((*start.options, f"--rollout-nodes {split.rollout_nodes}"), start.recipe, split)


def _set(start: Change, key: str, value: float | str) -> Change:
    shown = str(value).lower() if isinstance(value, bool) else value
    recipe = _with(start.recipe, tuple(key.split(".")), value)
    return Change((*start.options, f"--set {key}={shown}"), recipe, start.layout)


def _with(recipe: Recipe, key: tuple[str, ...], value: float | str) -> Recipe:
    """A copy with one value changed; the value is of the field's own range."""
    section, name = key
    inner: Section = getattr(recipe, section)
    return recipe.model_copy(update={section: inner.model_copy(update={name: value})})
