"""Accuracy and length on held-out prompts, in RL and on its own.

    python -m lrscale.stages.evaluate RUN|MODEL [--recipe-json FILE] [--arm ARM]

prints one JSON object a model on stdout and a table on stderr.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lrscale.config.recipe import Recipe
from lrscale.config.stages import Arm
from lrscale.latent import LatentPolicy
from lrscale.records import RolloutGroup, Score
from lrscale.report.metrics import wilson_interval
from lrscale.report.timing import PhaseTimer
from lrscale.rollout.engine import SamplingPlan
from lrscale.stages.randomness import stream_seed
from lrscale.stages.rollout_io import json_lines, shown, write_whole
from lrscale.stages.sampling import ARMS, Sampler, completion_markers, is_right, mean

STAGE = "evaluate"

When = Literal["before", "during", "after"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of one arm."""

    metrics: dict[str, Any]
    groups: list[RolloutGroup]


def evaluate_arm(sampler: Sampler, recipe: Recipe, arm: Arm, *, step: int, when: When) -> Evaluation:
    """Sample the held-out prompts as the arm does.

    The same prompts and random streams at every time and for every arm, so that differences are paired.
    """
    config = recipe.stages.evaluate
    kind = ARMS[arm]
    prompts = sampler.book.prompts("eval", markers=kind.markers)[: config.prompts]
    plan = SamplingPlan(seed=stream_seed(recipe.seed, STAGE), mode=kind.mode, temperature=config.temperature)
    timer = PhaseTimer()
    groups = sampler.groups(prompts, config.samples_per_prompt, plan, timer, label=f"evaluate {arm}")
    metrics = {"stage": STAGE, "arm": arm, "step": step, "when": when, **summarise(sampler, groups)}
    metrics["evaluate_s"] = timer.take()["step_s"]
    return Evaluation(metrics, groups)


def summarise(sampler: Sampler, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """The figures of an evaluation.

    The interval is Wilson's over prompts: several samples of a prompt sharpen its share of right
    answers but are no further prompts, so they do not narrow the interval as if they were.
    """
    policy, task = sampler.policy, sampler.book.task
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    shares = [[is_right(score) for score in group.scores if isinstance(score, Score)] for group in groups]
    scored = [sum(share) / len(share) for share in shares if share]
    low, high = wilson_interval(min(sum(scored), float(len(scored))), len(scored))
    markers = [completion_markers(policy, rollout) for rollout in rollouts]
    return {
        "prompts": len(groups),
        "samples": len(rollouts),
        "scores_failed": len(rollouts) - sum(map(len, shares)),
        "accuracy": sum(scored) / max(len(scored), 1),
        "accuracy_low": low,
        "accuracy_high": high,
        "tokens_mean": mean([len(rollout.completion_ids) for rollout in rollouts]),
        "latent_steps_mean": mean([rollout.completion_latent_steps for rollout in rollouts]),
        "markers_mean": mean([len(found) for found in markers]),
        "no_answer_share": mean([not task.answered(sampler.text(rollout)) for rollout in rollouts]),
        "marker_histogram": _histogram(len(found) for found in markers),
        "steps_histogram": _histogram(steps for found in markers for steps in found),
    }


def shown_rollouts(
    policy: LatentPolicy, evaluation: Evaluation, *, arm: Arm, when: When, count: int
) -> list[dict[str, Any]]:
    """The first sample of the first prompts, for the report."""
    return [
        {
            "arm": arm,
            "when": when,
            **shown(
                policy,
                group.prompt,
                group.rollouts[0],
                group.scores[0].value if isinstance(group.scores[0], Score) else None,
            ),
        }
        for group in evaluation.groups[:count]
    ]


def evaluation_line(metrics: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"{metrics['arm']} {metrics['when']} (step {metrics['step']}): accuracy {metrics['accuracy']:.3f} "
        f"[{metrics['accuracy_low']:.3f}, {metrics['accuracy_high']:.3f}] on {metrics['prompts']} prompts, "
        f"{metrics['tokens_mean']:.1f} tokens, {metrics['latent_steps_mean']:.2f} latent steps, "
        f"{metrics['markers_mean']:.2f} markers, no answer {metrics['no_answer_share']:.1%}"
    )


def evaluate_and_record(parts: Any, arm: Arm, *, step: int, when: When) -> None:
    """Evaluate inside a run: metrics, one line, and the rollouts that the report shows."""
    evaluation = evaluate_arm(parts.sampler, parts.recipe, arm, step=step, when=when)
    parts.log.record(evaluation.metrics)
    parts.log.say(evaluation_line(evaluation.metrics))
    count = parts.recipe.stages.evaluate.shown_rollouts
    if when != "during" and count:
        lines = shown_rollouts(parts.policy, evaluation, arm=arm, when=when, count=count)
        write_whole(parts.run_dir / "rollouts" / f"evaluate-{arm}-{when}.jsonl", json_lines(lines))


def _histogram(values: Any) -> dict[str, int]:
    """Counts by value, keys as strings as JSON has them, in order."""
    return {str(value): count for value, count in sorted(Counter(values).items())}
