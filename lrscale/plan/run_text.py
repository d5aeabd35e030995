"""A plan as people read it, and as numbers for scripts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lrscale.config.arms import OWN_LATENT_ARMS
from lrscale.plan.run_plan import RunPlan
from lrscale.plan.summary import amount, count, counted, every, phase_values, size, span

_SHOWN = 0.05
"""Of a unit: what is less is 0.0."""
_STEP_PARTS = ("rollout", "scoring", "log_probs", "update", "publish", "refresh", "checkpoint")


def run_lines(plan: RunPlan) -> Iterator[str]:
    """Tables and sentences, a subject after the other."""
    yield from _subject(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _step(plan)
    yield ""
    yield from _cost(plan)


def assumptions(plan: RunPlan, given: Collection[str]) -> Iterator[str]:
    """What the plan takes for granted because nobody said; `given` are the names of options that did not have to."""
    work = plan.work
    told = {
        "prompt_tokens": f"prompts of {work.prompt_tokens:,.0f} tokens",
        "mean_new_tokens": f"completions of {work.lengths.mean:,.0f} positions on average",
        "latent_share": f"{work.latent_share:.0%} of them latent",
        "spread": f"their lengths log-normal with a spread of {work.lengths.spread:g}",
    }
    words = [f"{said} (--{name.replace('_', '-')})" for name, said in told.items() if name not in given]
    if words:
        yield f"assumed: {', '.join(words)}"
    if plan.recipe.model.device == "cpu":
        yield f"the recipe runs on CPUs; planned as if each of its ranks had a GPU of its own ({plan.machine.gpu.name})"
    yield from _of_engines(plan)
    cluster, ending_s = plan.recipe.cluster, plan.step.total + plan.rates.checkpoint_s
    if cluster.time_limit is not None and ending_s > cluster.drain_s:
        yield (
            f"warning: a step and a checkpoint take {span(ending_s)}, and a job is asked to end cluster.drain_s = "
            f"{cluster.drain_s} s before it is killed: --set cluster.drain_s={math.ceil(1.2 * ending_s)}"
        )
    if not plan.dims.exact:
        yield "the model's kind is not among those that are counted exactly: counted as if it were a Llama"
    if plan.dims.ends_in_mixture:
        yield (
            "the last MLP is a mixture of experts, which no projector can be cloned from: planned with one of the dense "
            "width, but the runtime would refuse to train it"
        )


def _of_engines(plan: RunPlan) -> Iterator[str]:
    """Where vLLM's engines do less in lrscale than the plan takes them to do."""
    if plan.layout.engine != "vllm":
        return
    if plan.recipe.rollout.kind != "vllm":
        yield (
            "weights are taken to reach the engines as fast as NeMo-RL's do (overheads.publish_gb_s); lrscale's files take "
            "longer, which a recipe with rollout.kind: vllm counts"
        )
    others = [arm for arm in plan.recipe.stages.rl.arms if arm not in OWN_LATENT_ARMS]
    if others:
        yield f"the trainer decodes arms {', '.join(others)}, slower than the engines at whose pace their steps are planned"


def run_values(plan: RunPlan) -> dict[str, Any]:
    """The same in numbers: GiB, seconds, hours."""
    over = plan.overflow
    return {
        "model": {
            "path": plan.recipe.model.path,
            "parameters": plan.dims.parameters,
            "active_parameters": plan.dims.active_parameters,
            "projector_parameters": _projector(plan),
            "exact": plan.dims.exact,
        },
        "gpu": plan.machine.gpu_name,
        "fabric": plan.machine.fabric_name,
        "layout": {**asdict(plan.layout), "gpus": plan.layout.gpus, "engines": plan.layout.engines},
        "workload": asdict(plan.work),
        "dtype": plan.recipe.model.dtype,
        "parallel": plan.recipe.parallel.kind,
        "arms": list(plan.recipe.stages.rl.arms),
        "steps": plan.recipe.stages.rl.steps,
        "checkpoint_every": plan.recipe.stages.rl.checkpoint_every,
        "fits": over is None,
        "overflow": None
        if over is None
        else {
            "phase": over.phase.name,
            "part": over.part,
            "needed_gib": over.needed,
            "limit_gib": over.limit,
            "host": over.host,
        },
        "suggestions": [asdict(one) for one in plan.suggestions],
        "gpu_limit_gib": plan.recipe.cluster.gpu_memory_gib,
        "gpu_gib": {"peak": plan.memory.peak, "phases": phase_values(plan.memory)},
        "host_gib_per_node": {phase.name: phase.host for phase in plan.memory.phases},
        "activations_gib": asdict(plan.activations),
        "checkpoint_gib": plan.checkpoint_gib,
        "checkpoints_gib": plan.disk_gib,
        "rates": asdict(plan.rates),
        "step_s": {name: getattr(plan.step, name) for name in _STEP_PARTS} | {"total": plan.step.total},
        "stages_s": asdict(plan.stages),
        "cost": asdict(plan.cost),
        "decoding": asdict(_pace(plan)),
        "constants": {
            "gpu": plan.machine.gpu.model_dump(),
            "fabric": plan.machine.fabric.model_dump(),
            "runs": plan.machine.runs.model_dump(),
            "efficiencies": plan.machine.efficiencies.model_dump(),
            "overheads": plan.machine.overheads.model_dump(),
            "sequences": plan.machine.sequences.model_dump(),
        },
    }


def _projector(plan: RunPlan) -> int:
    projector = plan.recipe.projector
    return plan.dims.projector_parameters(projector.layers, projector.kind)


def _subject(plan: RunPlan) -> Iterator[str]:
    dims, layout, machine = plan.dims, plan.layout, plan.machine
    between = f", {machine.fabric_name} between nodes" if layout.nodes > 1 else ""
    active = f" ({count(dims.active_parameters)} active)" if dims.experts else ""
    yield (
        f"model     {plan.recipe.model.path}, {count(dims.parameters)} parameters{active} and "
        f"{count(_projector(plan))} of the projector, {plan.recipe.model.dtype}"
    )
    yield (
        f"machine   {layout.nodes} x {layout.gpus_per_node} {machine.gpu.name}{between}, "
        f"{plan.recipe.cluster.gpu_memory_gib:g} GiB a GPU"
    )
    if layout.engine == "local":
        engine = "decoding in the training processes"
    else:
        where = "beside the trainer" if layout.colocated else f"on {counted(layout.rollout_nodes, 'node')} of their own"
        engine = f"{counted(layout.engines, 'engine')} of {counted(layout.tensor_parallel, 'GPU')} {where}"
    off = ", one step off policy" if layout.one_step_off else ""
    yield f"layout    {plan.recipe.parallel.kind} on {counted(layout.train_gpus, 'GPU')}, {engine}{off}"


def _memory(plan: RunPlan) -> Iterator[str]:
    memory, limit = plan.memory, plan.recipe.cluster.gpu_memory_gib
    small = all(phase.total - phase.part("allowance") < 1 for phase in memory.phases)
    unit, of_gib = ("MiB", 1024.0) if small else ("GiB", 1.0)
    yield f"{'memory, ' + unit:<15s}{'GPU':>7s}{'host':>8s}  what it is for"
    for phase in memory.phases:
        sizes = ((name, gib * of_gib) for name, gib in phase.parts)
        parts = ", ".join(f"{name} {number:.1f}" for name, number in sizes if number >= _SHOWN)
        mark = "  TOO MUCH" if plan.overflow is not None and phase.total > limit else ""
        yield f"{phase.name:<15s}{phase.total * of_gib:7.1f}{phase.host * of_gib:8.1f}  {parts}{mark}"
    kept = plan.activations
    yield f"activations of an update: {size(kept.checkpointed)} with checkpointing, {size(kept.whole)} without"
    yield f"checkpoint of {size(plan.checkpoint_gib)} on disk, {size(plan.disk_gib)} with all that the run keeps"
    over = plan.overflow
    if over is None:
        yield f"fits: {memory.peak:.1f} of {limit:g} GiB a GPU at most ({memory.largest.name})"
        return
    yield (
        f"does not fit: {over.phase.name} is the first to run out, {over.needed:.1f} of {over.limit:g} GiB "
        f"{'of host memory a node' if over.host else 'a GPU'}, most of it {over.part}"
    )
    for one in plan.suggestions:
        yield f"  fits with {' '.join(one.options)} ({one.peak:.1f} GiB a GPU, {one.host:,.0f} of host memory a node)"
    if not plan.suggestions:
        yield "  neither one change nor two were found with which it would"


def _step(plan: RunPlan) -> Iterator[str]:
    step, work = plan.step, plan.work
    yield f"{'RL step':<15s}{'s':>7s}{'share':>8s}"
    words, digits = _said_of_step(plan), 1 if step.total >= 10 else 3
    for name in _STEP_PARTS:
        seconds = getattr(step, name)
        if seconds >= 0.5 * 10**-digits:
            share = "" if step.one_step_off else f"{seconds / step.total:.0%}"  # at the same time: no shares of a whole
            yield f"{name.replace('_', '-'):<15s}{seconds:7.{digits}f}{share:>8s}  {words.get(name, '')}".rstrip()
    together = ", the slower of generating and training" if step.one_step_off else ""
    yield f"{'step':<15s}{step.total:7.{digits}f}{'':8s}  {work.sequences} sequences, {count(round(work.positions))} positions{together}"


def _said_of_step(plan: RunPlan) -> dict[str, str]:
    rates, work, pace = plan.rates, plan.work, _pace(plan)
    return {
        "rollout": (
            f"{counted(pace.sequences, 'sequence')} an engine, {1e3 * pace.position_s:.0f} ms a position, bound by what is "
            f"{pace.bound_by}"
        ),
        "refresh": f"{span(rates.refresh_s)} {every(work.refresh_every)}",
        "checkpoint": f"{span(rates.checkpoint_s)} {every(plan.recipe.stages.rl.checkpoint_every)}",
    }


@dataclass(frozen=True, slots=True)
class _Pace:
    """How an engine decodes halfway through."""

    sequences: int
    """At once."""
    position_s: float
    bound_by: str


def _pace(plan: RunPlan) -> _Pace:
    rates, work = plan.rates, plan.work
    batch = min(rates.places(work.prompt_tokens, work.lengths.mean, work.group), -(-work.sequences // rates.engines))
    position_s = rates.decode_step_s(batch, work.prompt_tokens + work.lengths.mean / 2, work.latent_share)
    if rates.step_s > position_s / 2:
        return _Pace(batch, position_s, "around it: collectives, and the program that launches kernels")
    return _Pace(batch, position_s, "read" if batch * rates.row_s < position_s - rates.step_s else "computed")


def _cost(plan: RunPlan) -> Iterator[str]:
    cost, rl, stages = plan.cost, plan.recipe.stages.rl, plan.stages
    price = "" if cost.price is None else f", {amount(cost.price)} at the price given"
    yield (
        f"run       {span(3600 * cost.hours)}, {amount(cost.gpu_hours)} GPU-hours, at most "
        f"{amount(cost.energy_kwh)} kWh{price}"
    )
    arms = f" for each of {len(rl.arms)} arms" if len(rl.arms) > 1 else ""
    parts = {
        "starting": plan.rates.start_s + plan.rates.load_s,
        "traces": stages.traces,
        "projector SFT": stages.projector_sft,
        f"RL ({counted(rl.steps, 'step')}{arms})": 3600 * cost.rl_hours,
        "evaluations": stages.evaluation,
    }
    yield "          " + ", ".join(f"{name} {span(seconds)}" for name, seconds in parts.items() if seconds)
    yield f"          {cost.tokens_per_gpu_s:,.0f} positions of RL a second and GPU"
