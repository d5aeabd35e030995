"""A study in words, a line a subject."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from lrscale.plan.layout import Layout
from lrscale.plan.run_plan import RunPlan
from lrscale.plan.simulation.ledger import PHASES
from lrscale.plan.simulation.splits import SplitTime
from lrscale.plan.simulation.study import Spread, Study
from lrscale.plan.summary import amount, every, span

_ROLES = {"generate": "engines", "score": "scoring workers", "train": "trainer"}


def study_lines(study: Study, plan: RunPlan) -> Iterator[str]:
    """For people; `plan` is what was simulated."""
    over, max_restarts = plan.overflow, plan.recipe.cluster.max_restarts
    if over is not None:
        yield (
            f"fits      no: {over.phase.name} takes {over.phase.total:.1f} of {over.limit:g} GiB a GPU; simulated as if "
            "there were room"
        )
    yield _runs(study, plan.recipe.stages.rl.steps)
    yield f"lengths   {study.scenario.lengths.name}"
    yield from _time(study)
    if study.restarts > max_restarts:
        yield (
            f"restarts  up to {study.restarts} of a run, and cluster.max_restarts allows {max_restarts}: raise it, or "
            "save more often than failures come"
        )
    shares = [(name, study.phases[name]) for name in PHASES if study.phases[name] >= 0.0005]
    yield "waits     " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares) + " of the wall time"
    if study.ended:
        yield "busy      " + ", ".join(
            f"{_ROLES[role]} {100 * share:.0f} %" for role, share in study.utilisation.items()
        )
    yield _saving(study)
    yield from _split(study, plan.layout)
    yield _reasoning(study)


def _runs(study: Study, recipe_steps: int) -> str:
    scenario, detailed = study.scenario, study.detailed_steps
    steps = f"{scenario.steps} step{'s' if scenario.steps > 1 else ''}"
    if scenario.steps != recipe_steps:
        steps += f" (the recipe, and the plan above, have {recipe_steps})"
    if scenario.arms > 1:
        steps += f" for each of {scenario.arms} arms, all alike"
    placed = f"{scenario.placement}, {scenario.schedule.replace('_', ' ')}"
    drawn = ""
    if detailed < scenario.all_steps:
        drawn = f", the first {detailed} of each sequence by sequence, the others drawn from them"
    return f"runs      {study.seeds} of {steps}, simulated ({placed}){drawn}"


def _time(study: Study) -> Iterator[str]:
    scenario, mtbf_s = study.scenario, study.scenario.mtbf_s
    mtbf = "none assumed" if math.isinf(mtbf_s) else f"one in {span(mtbf_s)} of this job"
    if study.ended < study.seeds:
        yield (
            f"ends      {study.ended} of {study.seeds} runs; otherwise nodes fail again and again before a checkpoint is "
            f"written ({mtbf})"
        )
    if not study.ended:
        return
    arms = " of the last arm" if scenario.arms > 1 else ""
    if math.isfinite(study.seconds.median):
        yield (
            f"time      {_of(study.seconds, span)} to step {scenario.steps}{arms}; {span(study.step_s.median)} a step; "
            f"{amount(study.failures)} failures a run ({mtbf})"
        )
        price = "" if study.price is None else f"; at the price given {_of(study.gpu_hours.times(study.price), amount)}"
        yield f"cost      GPU-hours {_of(study.gpu_hours, amount)}{price}; lost work counts, the queue does not"


def _of(spread: Spread, shown: Callable[[float], str]) -> str:
    """With what most runs lie between, where they differ."""
    low, high = (shown(value) if math.isfinite(value) else "no end" for value in (spread.low, spread.high))
    return shown(spread.median) if low == high else f"{shown(spread.median)} (10 to 90 %: {low} to {high})"


def _saving(study: Study) -> str:
    intervals = study.intervals
    chosen, found = intervals.chosen, intervals.best
    if found.simulated == 1.0:
        return "saving    at no interval does the run get on: nodes fail before the shortest has ended"
    cost, least = (f"{100 * interval.simulated:.1f} %" for interval in (chosen, found))
    own = f"saving    {every(chosen.steps)} costs {cost} of the time with what failures take"
    if math.isinf(intervals.daly_s):
        return f"{own}; without failures, the fewer the better"
    near = f"Young {span(intervals.young_s)}, Daly {span(intervals.daly_s)} between checkpoints"
    if least == cost:
        return f"{own}; no other interval is better ({near})"
    return f"{own}; best {every(found.steps)} ({span(found.seconds)}), {least} ({near})"


def _split(study: Study, layout: Layout) -> Iterator[str]:
    split, files = study.split, layout.weight_files
    if split is None:
        yield "split     no way to share the nodes out: give another number, or sequences that divide"
        return
    best, off = split.best, split.best_off
    if math.isinf(best.step_s):
        yield f"split     no way of sharing {split.nodes} nodes out runs: {best.reason}"
        return
    yield (
        f"split     best of {len(split.tried)} that can be launched (vLLM, synchronous): {_placed(best, split.nodes, files=files)}, "
        f"{span(best.step_s)} a step; as laid out {span(study.reasoning[0].step_s)}"
    )
    if math.isfinite(off.one_step_off_s):
        yield (
            f"          one step off policy, which lrscale plans and does not run yet: {_placed(off, split.nodes, files=files)}, "
            f"{span(off.one_step_off_s)} a step"
        )


def _placed(split: SplitTime, nodes: int, *, files: bool) -> str:
    engines = f"engines of {split.gpus_per_engine} GPU{'s' if split.gpus_per_engine > 1 else ''}"
    if not split.generate_nodes:
        return f"{engines} beside the trainer"
    return (
        f"{split.generate_nodes} of {nodes} nodes generate ({engines}, weights by {'files' if files else 'broadcast'})"
    )


def _reasoning(study: Study) -> str:
    own, other = study.reasoning
    change = 100 * (other.step_s / own.step_s - 1)
    sizes = " against ".join(f"{way.tokens:.0f} tokens and {way.latent_steps:.0f} latent steps" for way in (other, own))
    return (
        f"latents   {other.name} instead ({sizes} a completion): {span(other.step_s)} a step, {change:+.0f} %, "
        "refreshes of the projector counted; which is right more often is not for a plan to say"
    )
