"""A study in words, a line a subject."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lrscale.plan.simulation.ledger import PHASES
from lrscale.plan.simulation.splits import SplitTime
from lrscale.plan.simulation.study import Spread, Study
from lrscale.plan.summary import span

_ROLES = {"generate": "engines", "score": "scoring workers", "train": "trainer"}


def study_lines(study: Study, max_restarts: int) -> Iterator[str]:
    """For people. `max_restarts`: how often the cluster lets a job go back into the queue."""
    yield _runs(study)
    yield f"lengths   {study.scenario.lengths.name}"
    yield _time(study)
    if study.restarts > max_restarts:
        yield (
            f"restarts  up to {study.restarts} of a run, and cluster.max_restarts allows {max_restarts}: raise it, or "
            "save more often than failures come"
        )
    shares = [(name, study.phases[name]) for name in PHASES if study.phases[name] >= 0.0005]
    yield "waits     " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares) + " of the wall time"
    yield "busy      " + ", ".join(f"{_ROLES[role]} {100 * share:.0f} %" for role, share in study.utilisation.items())
    yield _saving(study)
    yield from _split(study)
    yield _reasoning(study)


def _runs(study: Study) -> str:
    steps, detailed = study.scenario.steps, study.detailed_steps
    drawn = (
        "" if detailed >= steps else f", the first {detailed} of each sequence by sequence, the others drawn from them"
    )
    placed = f"{study.scenario.placement}, {study.scenario.schedule.replace('_', ' ')}"
    return f"runs      {study.seeds} of {steps} steps, simulated ({placed}){drawn}"


def _time(study: Study) -> str:
    step = study.step_s
    return (
        f"time      {_of(study.seconds)} to step {study.scenario.steps}; {span(step.median)} a step; {study.failures:.2g} "
        f"failures a run ({_mtbf(study)})"
    )


def _mtbf(study: Study) -> str:
    mtbf = study.scenario.mtbf_s
    return "none assumed" if math.isinf(mtbf) else f"one in {span(mtbf)} of this job"


def _of(spread: Spread) -> str:
    if math.isinf(spread.median):
        return "never"
    return f"{span(spread.median)} (10 to 90 %: {span(spread.low)} to {span(spread.high)})"


def _saving(study: Study) -> str:
    intervals = study.intervals
    chosen, found = intervals.chosen, intervals.best
    own = (
        f"saving    every {chosen.steps} steps costs {100 * chosen.simulated:.1f} % of the time with what failures take"
    )
    if math.isinf(intervals.daly_s):
        return f"{own}; without failures, the fewer the better"
    near = f"Young {span(intervals.young_s)}, Daly {span(intervals.daly_s)} between checkpoints"
    if found.steps == chosen.steps:
        return f"{own}; no other interval is better ({near})"
    return f"{own}; best every {found.steps} ({span(found.seconds)}), {100 * found.simulated:.1f} % ({near})"


def _split(study: Study) -> Iterator[str]:
    split = study.split
    if split is None:
        yield "split     no way to share the nodes out: give another number, or sequences that divide"
        return
    best, off = split.best, split.best_off
    if math.isinf(best.step_s):
        yield f"split     no way of sharing {split.nodes} nodes out runs: {best.reason}"
        return
    yield (
        f"split     best of {len(split.tried)} that can be launched (vLLM, synchronous): {_placed(best, split.nodes)}, "
        f"{span(best.step_s)} a step; as laid out {span(study.reasoning[0].step_s)}"
    )
    if math.isfinite(off.one_step_off_s):
        yield (
            f"          one step off policy, which lrscale plans and does not run yet: {_placed(off, split.nodes)}, "
            f"{span(off.one_step_off_s)} a step"
        )


def _placed(split: SplitTime, nodes: int) -> str:
    engines = f"engines of {split.gpus_per_engine} GPU{'s' if split.gpus_per_engine > 1 else ''}"
    if not split.generate_nodes:
        return f"{engines} beside the trainer"
    return f"{split.generate_nodes} of {nodes} nodes generate ({engines})"


def _reasoning(study: Study) -> str:
    own, other = study.reasoning
    change = 100 * (other.step_s / own.step_s - 1)
    sizes = " against ".join(f"{way.tokens:.0f} tokens and {way.latent_steps:.0f} latent steps" for way in (other, own))
    return (
        f"latents   {other.name} instead ({sizes} a completion): {span(other.step_s)} a step, {change:+.0f} %, "
        "refreshes of the projector counted; which is right more often is not for a plan to say"
    )
