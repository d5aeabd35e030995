"""Stage 1: explicit reasoning traces of the base, those with a positive reward kept.

    prompts (no marker paragraph) -> k samples each -> scores -> traces/part-00000.jsonl, part-00001.jsonl ...

A part is written in one go once its batch is scored: its first line is the batch's metrics, each of the
others a trace. Parts that are there are never sampled again, so the stage restarts where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrscale.parallel.lockstep import Lockstep
from lrscale.records import Prompt, RolloutGroup, Score, Trace
from lrscale.report.timing import PhaseTimer
from lrscale.rollout.engine import SamplingPlan
from lrscale.stages.clock import phase_timer
from lrscale.stages.parts import Parts
from lrscale.stages.randomness import shuffled, stream_seed
from lrscale.stages.rollout_io import json_lines, read_json_lines, trace_from_json, trace_to_json, write_whole
from lrscale.stages.sampling import Occasion, is_right, task_value

STAGE = "traces"


def collect_traces(parts: Parts) -> None:
    """Sample what is still missing; ends with every batch's metrics in metrics.jsonl."""
    config = parts.recipe.stages.traces
    chosen = chosen_prompts(parts)
    size = config.prompts_per_batch
    batches = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    lockstep = parts.engine.lockstep
    if parts.log.metrics is not None:
        parts.log.metrics.truncate(0)
    total: dict[str, Any] = {}
    there = set(lockstep.on_main(lambda: [i for i in range(len(batches)) if part_path(parts.run_dir, i).is_file()]))
    done = sum(len(batches[index]) for index in there)
    parts.rollouts.load_weights(parts.engine.full_parameters(), version=0)
    timer = phase_timer(parts.policy, "rollout", "score")
    with parts.log.progress(STAGE, len(chosen), unit="prompts", done=done) as progress:
        for index, batch in enumerate(batches):
            path = part_path(parts.run_dir, index)
            if index in there:
                total = lockstep.on_main(lambda path=path: read_json_lines(path)[0]["metrics"])
                parts.log.record(total)
                continue
            groups = sample_batch(parts, batch, index, timer)
            total = add_up(total, groups, step=index + 1, seconds=timer.take())
            traces = kept_traces(groups)
            content = json_lines([{"metrics": total}, *map(trace_to_json, traces)])
            lockstep.on_main(lambda path=path, content=content: write_whole(path, content))
            parts.log.record(total)
            progress.advance(len(batch), note=f"accuracy {total['accuracy']:.3f}")
            parts.drain.leave_if_asked(STAGE, index + 1)
    parts.log.say(
        f"traces: {total['kept']} of {total['samples']} kept, accuracy {total['accuracy']:.3f}, "
        f"{total['tokens_mean']:.1f} tokens on average"
    )
    if not total["kept"]:
        raise ValueError(
            f"no trace earned a positive reward ({total['samples']} samples): there is nothing to train the projector "
            "on. Look at the task and the reward, sample more (stages.traces), or start from a stronger base"
        )


def chosen_prompts(parts: Parts) -> list[Prompt]:
    """The training prompts that traces are sampled from, in the order of the batches."""
    prompts = parts.book.prompts("train", markers=False)
    return shuffled(prompts, parts.recipe.seed, STAGE)[: parts.recipe.stages.traces.prompts]


def sample_batch(parts: Parts, prompts: Sequence[Prompt], index: int, timer: PhaseTimer) -> list[RolloutGroup]:
    """Markers stay plain text here, should the base write any: these are explicit traces."""
    plan = SamplingPlan(seed=stream_seed(parts.recipe.seed, STAGE, index), mode="zero")
    occasion = Occasion(name=f"{STAGE} {index}")
    return parts.sampler.groups(prompts, parts.recipe.stages.traces.samples_per_prompt, plan, timer, occasion)


def kept_traces(groups: Sequence[RolloutGroup]) -> list[Trace]:
    """The samples with a positive reward; a price on length never decides."""
    return [
        Trace(group.prompt.prompt_id, rollout.prompt_ids, rollout.completion_ids, task_value(score))
        for group in groups
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
        if isinstance(score, Score) and is_right(score)
    ]


def add_up(
    before: dict[str, Any], groups: Sequence[RolloutGroup], *, step: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """Counts and means from the first batch to this one."""
    scored = [(rollout, score) for group in groups for rollout, score in zip(group.rollouts, group.scores, strict=True)]
    total = {
        key: before.get(key, 0) + value
        for key, value in {
            "prompts": len(groups),
            "samples": len(scored),
            "scores_failed": sum(not isinstance(score, Score) for _, score in scored),
            "kept": sum(is_right(score) for _, score in scored),
            "tokens": sum(len(rollout.completion_ids) for rollout, _ in scored),
        }.items()
    }
    valid = total["samples"] - total["scores_failed"]
    return {
        "stage": STAGE,
        "step": step,
        **total,
        "accuracy": total["kept"] / max(valid, 1),
        "tokens_mean": total["tokens"] / total["samples"],
        **seconds,
    }


def read_traces(run_dir: Path, lockstep: Lockstep) -> list[Trace]:
    """All kept traces in the order of their prompts; ValueError where the stage has not run."""

    def entries() -> list[dict[str, Any]]:
        paths = sorted((run_dir / STAGE).glob("part-*.jsonl"))
        return [entry for path in paths for entry in ({}, *read_json_lines(path)[1:])]

    found = lockstep.on_main(entries)
    if not found:
        raise ValueError(f"{run_dir / STAGE} holds no traces: run the stage `traces` first (stages.run)")
    return [trace_from_json(entry) for entry in found if entry]


def part_path(run_dir: Path, index: int) -> Path:
    return run_dir / STAGE / f"part-{index:05d}.jsonl"
