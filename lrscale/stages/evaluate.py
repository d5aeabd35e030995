"""Accuracy and length on held-out prompts, in RL and on its own.

    python -m lrscale.stages.evaluate RUN|MODEL [--recipe-json FILE]

evaluates the model of every finished arm of a run, or one model: one JSON object each on stdout, a table on
stderr. A model that has a projector is decoded as the arm `latent`, a plain one as `discrete`, one in
a folder that is called after an arm as that arm.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lrscale.config.arms import Arm
from lrscale.config.load import read_recipe
from lrscale.config.recipe import Recipe
from lrscale.latent import LatentPolicy
from lrscale.parallel.loading import checkpoint_projector, load_policy
from lrscale.parallel.ranks import set_threads
from lrscale.records import RolloutGroup, Score
from lrscale.report.metrics import wilson_interval
from lrscale.report.table import Cells, plain_table
from lrscale.rollout.engine import SamplingPlan
from lrscale.stages.clock import phase_timer
from lrscale.stages.parts import Parts, build_sampler
from lrscale.stages.randomness import stream_seed
from lrscale.stages.rollout_engines import finished_rollouts
from lrscale.stages.rollout_io import json_lines, shown, write_whole
from lrscale.stages.run_log import Display
from lrscale.stages.sampling import ARMS, Occasion, Sampler, completion_markers, is_right, mean
from lrscale.stages.start_checks import check_prompt_counts

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
    timer = phase_timer(sampler.policy)
    occasion = Occasion(f"evaluate {arm}", name=f"{STAGE} {arm} {when} {step}")
    groups = sampler.groups(prompts, config.samples_per_prompt, plan, timer, occasion)
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


def evaluate_and_record(parts: Parts, arm: Arm, *, step: int, when: When) -> None:
    """Evaluate inside a run: metrics, one line, and the rollouts that the report shows."""
    evaluation = evaluate_arm(parts.sampler, parts.recipe, arm, step=step, when=when)
    parts.log.record(evaluation.metrics)
    parts.log.say(evaluation_line(evaluation.metrics))
    count = parts.recipe.stages.evaluate.shown_rollouts
    if when != "during" and count:
        lines = shown_rollouts(parts.policy, evaluation, arm=arm, when=when, count=count)
        path = parts.run_dir / "rollouts" / f"evaluate-{arm}-{when}.jsonl"
        parts.engine.lockstep.on_main(lambda: write_whole(path, json_lines(lines)))


def _histogram(values: Any) -> dict[str, int]:
    """Counts by value, keys as strings as JSON has them, in order."""
    return {str(value): count for value, count in sorted(Counter(values).items())}


@dataclass(frozen=True, slots=True)
class Target:
    """A model to be evaluated on its own."""

    recipe: Recipe
    """The model's path put in."""
    recipe_dir: Path
    arm: Arm


def find_targets(target: str, recipe_json: Path | None) -> list[Target]:
    """The models that a run directory, model folder or hub id stands for.

    Raises:
        ValueError: a run without a finished arm.
    """
    folder = Path(target)
    is_run = (folder / "recipe.json").is_file()
    if recipe_json is None and is_run:
        recipe_json = folder / "recipe.json"
    recipe = Recipe() if recipe_json is None else read_recipe(recipe_json)
    recipe_dir = Path() if recipe_json is None else recipe_json.parent
    if not is_run:
        return [_target(target, recipe, recipe_dir)]
    arms = [arm for arm in ARMS if (folder / "models" / arm / "config.json").is_file()]
    if not arms:
        raise ValueError(f"{target} has no finished arm to evaluate: finish the run, or name a model folder")
    return [_target(str(folder / "models" / arm), recipe, recipe_dir) for arm in arms]


def _target(path: str, recipe: Recipe, recipe_dir: Path) -> Target:
    model = recipe.model.model_copy(update={"path": path})
    projector = checkpoint_projector(model)
    name = Path(path).name
    # A plain model's projector is an untrained clone of its last MLP: nothing to decode with.
    arm: Arm = name if name in ARMS else "latent" if has_projector(path) else "discrete"
    return Target(recipe.model_copy(update={"model": model, "projector": projector}), recipe_dir, arm)


def has_projector(path: str) -> bool:
    """Whether a local folder holds a LiteReason checkpoint."""
    config = Path(path) / "config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("is_litereason_model"))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 3 something does not fit, 6 the evaluation failed, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m lrscale.stages.evaluate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("target", help="run directory, model folder or hub id")
    parser.add_argument("--recipe-json", type=Path, help="task and sampling; a run has its own")
    parser.add_argument("--engine", choices=("local", "vllm"), default="local", help="what samples; local by default")
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    try:
        for target in find_targets(options.target, options.recipe_json):
            results.append(evaluate_target(target, engine=options.engine))
            print(json.dumps(results[-1]), flush=True)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {str(error).removeprefix('error: ')}", file=sys.stderr)
        return 3 if isinstance(error, ValueError) else 6
    print(plain_table(result_cells(results)), file=sys.stderr)
    return 0


def evaluate_target(target: Target, *, engine: str = "local") -> dict[str, Any]:
    """One model's figures, with its path."""
    recipe = target.recipe
    policy = load_policy(recipe.model, recipe.projector)
    set_threads(recipe.parallel.threads)
    with ExitStack() as stack:
        rollouts = None
        if engine == "vllm":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrscale-evaluate-")))
            rollouts = stack.enter_context(closing(finished_rollouts(recipe, policy, folder, Display().say)))
        sampler = build_sampler(recipe, policy, recipe_dir=target.recipe_dir, display=Display())
        sampler = sampler if rollouts is None else replace(sampler, rollouts=rollouts)
        stack.enter_context(closing(sampler.scorer))
        check_prompt_counts(recipe, sampler.book, [STAGE])
        evaluation = evaluate_arm(sampler, recipe, target.arm, step=recipe.stages.rl.steps, when="after")
    return {"model": recipe.model.path, **evaluation.metrics}


def result_cells(results: Sequence[dict[str, Any]]) -> Cells:
    """The table of a standalone evaluation."""
    header = ("model", "as", "accuracy, % [95 %]", "prompts", "tokens", "latent steps", "markers", "no answer, %")
    rows = tuple(
        (
            result["model"],
            result["arm"],
            f"{100 * result['accuracy']:.1f} [{100 * result['accuracy_low']:.1f}, {100 * result['accuracy_high']:.1f}]",
            str(result["prompts"]),
            f"{result['tokens_mean']:.1f}",
            f"{result['latent_steps_mean']:.2f}",
            f"{result['markers_mean']:.2f}",
            f"{100 * result['no_answer_share']:.1f}",
        )
        for result in results
    )
    return Cells(header, rows, text_columns=2)


if __name__ == "__main__":
    sys.exit(main())
