"""The stages of a run in order, each from wherever it stands.

traces -> projector_sft -> arm 1: evaluate, RL, evaluate -> arm 2: the same from the same start -> ...
"""

from __future__ import annotations

from collections.abc import Sequence

from lrscale.latent import LatentPolicy
from lrscale.parallel.build import load_frozen
from lrscale.parallel.export import export_model
from lrscale.stages import projector_sft, rl, traces
from lrscale.stages.decode_estimate import say_decoding_time
from lrscale.stages.evaluate import evaluate_and_record
from lrscale.stages.journal import Journal
from lrscale.stages.lengths import check_lengths
from lrscale.stages.lite_rows import LiteRow
from lrscale.stages.parts import Parts, read_ds_config


def run_stages(parts: Parts) -> None:
    """Everything the recipe's `stages.run` names that is not done yet."""
    check_lengths(parts)
    say_decoding_time(parts)
    run = parts.recipe.stages.run
    journal = Journal(parts.run_dir / "checkpoints", parts.engine, parts.log.metrics, parts.recipe.checkpoints)
    if traces.STAGE in run and not journal.is_done(traces.STAGE):
        traces.collect_traces(parts)
        journal.finish(traces.STAGE)
    if not journal.is_done(projector_sft.STAGE):
        if projector_sft.STAGE in run:
            projector_sft.run_projector_sft(parts, journal)
        else:  # every arm starts from a checkpoint of this name
            journal.save(projector_sft.STAGE, 0, {"final": True})
        journal.finish(projector_sft.STAGE)
    if rl.STAGE not in run and "evaluate" not in run:
        save_model(parts, projector_sft.STAGE)
        return
    reference = reference_policy(parts)
    heldout: Sequence[LiteRow] = ()
    if rl.STAGE in run and projector_sft.STAGE in run:
        heldout = projector_sft.stage_rows(parts)[1]
    for arm in parts.recipe.stages.rl.arms:
        if not journal.is_done(arm):
            run_whole_arm(rl.ArmRun(parts, arm, journal, heldout, reference))
            journal.finish(arm)
            if arm != parts.recipe.stages.rl.arms[-1]:
                parts.drain.leave_if_asked(arm, parts.recipe.stages.rl.steps)


def run_whole_arm(whole: rl.ArmRun) -> None:
    """One arm with its evaluations; ends with its model in models/ARM."""
    parts, arm, journal = whole.parts, whole.arm, whole.journal
    run = parts.recipe.stages.run
    steps = parts.recipe.stages.rl.steps if rl.STAGE in run else 0
    state = journal.resume(arm)
    totals = rl.Totals(**(state or {}).get("totals", {}))
    if state is None:
        journal.load_end_of(projector_sft.STAGE)
        parts.rollouts.load_weights(parts.engine.full_parameters(), version=0)
        if "evaluate" in run:
            evaluate_and_record(parts, arm, step=0, when="before")
    if steps:
        rl.run_arm(whole, state or {}, totals)
        if (state or {}).get("step", 0) < steps:  # an attempt that left without a step would come here again
            parts.drain.leave_if_asked(arm, steps)
        if "evaluate" in run:
            evaluate_and_record(parts, arm, step=steps, when="after")
    save_model(parts, arm)
    totals.tick()
    minutes = {"minutes": totals.seconds / 60, "cpu_minutes": totals.cpu_seconds / 60}
    parts.log.record({"stage": "arm", "arm": arm, "step": steps, **minutes})
    parts.log.say(f"{arm}: done, {totals.seconds / 60:.1f} minutes; model in {parts.run_dir / 'models' / arm}")


def reference_policy(parts: Parts) -> LatentPolicy | None:
    """A frozen copy of the base that RL starts from, where a KL term asks for it."""
    recipe = parts.recipe
    if rl.STAGE not in recipe.stages.run or not recipe.stages.rl.kl.coefficient:
        return None
    reference = load_frozen(recipe, parts.engine.lockstep, read_ds_config(parts.run_dir))
    return reference


def save_model(parts: Parts, name: str) -> None:
    """models/NAME in the Hugging Face layout, whole or not at all, on the disk for good on return."""
    export_model(parts.engine, parts.run_dir / "models" / name)
