"""What a run that went before tells about the next one: lengths of completions, and what scoring took."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.plan.lengths import Lengths
from lrscale.plan.simulation.lengths import AssumedLengths, Completion, LengthSource, MeasuredLengths


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """What can be drawn from a run."""

    lengths: Mapping[str, LengthSource]
    """By arm."""
    prompt_tokens: float | None
    score_s: float | None
    """Mean seconds a score; None where the task's own rule scored."""


def read_measured(run_dir: Path) -> MeasuredRun:
    """From rollouts/ARM-step-N.jsonl; where none were kept, from the means in metrics.jsonl.

    Raises:
        LaunchError: the run has sampled nothing yet, or a file is damaged.
    """
    completions: dict[str, list[Completion]] = {}
    prompts: list[int] = []
    for path in sorted((run_dir / "rollouts").glob("*-step-*.jsonl")):
        for line in _lines(path):
            arm, tokens, steps = line.get("arm"), line.get("tokens"), line.get("latent_steps")
            if isinstance(arm, str) and isinstance(tokens, int) and isinstance(steps, int):
                completions.setdefault(arm, []).append(Completion(tokens, steps))
                prompts.append(len(line.get("prompt_ids") or ()))
    metrics = list(_lines(run_dir / "metrics.jsonl")) if (run_dir / "metrics.jsonl").is_file() else []
    lengths: dict[str, LengthSource] = {
        arm: MeasuredLengths(tuple(seen), f"{run_dir.name}, arm {arm}") for arm, seen in completions.items()
    }
    lengths = {**_from_means(metrics, _limit(run_dir)), **lengths}
    if not lengths:
        raise LaunchError(
            f"{run_dir} holds no lengths: neither rollouts/*-step-*.jsonl nor RL steps in metrics.jsonl",
            code=ExitCode.NOT_FOUND,
            help="name a run that has done RL steps, or give --mean-new-tokens",
        )
    scored = [line for line in metrics if line.get("stage") == "reward" and line.get("samples")]
    samples = sum(int(line["samples"]) for line in scored)
    return MeasuredRun(
        lengths,
        sum(prompts) / len(prompts) if prompts else None,
        sum(float(line["scoring_s"]) for line in scored) / samples if samples else None,
    )


def _from_means(metrics: list[dict[str, Any]], limit: int) -> dict[str, LengthSource]:
    """Log-normal lengths of the usual spread around the mean of an arm's RL steps."""
    means: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        if line.get("stage") == "rl" and isinstance(line.get("arm"), str) and line.get("tokens_mean"):
            means.setdefault(line["arm"], []).append((line["tokens_mean"], line.get("latent_steps_mean") or 0.0))
    found: dict[str, LengthSource] = {}
    for arm, steps in means.items():
        tokens, latents = (sum(values) for values in zip(*steps, strict=True))
        positions = tokens + latents
        found[arm] = AssumedLengths(Lengths(positions / len(steps), limit), latents / positions)
    return found


def _limit(run_dir: Path) -> int:
    try:
        recipe = json.loads((run_dir / "recipe.json").read_text(encoding="utf-8"))
        return int(recipe["rollout"]["max_new_tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1 << 20


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects, a line each; a last one that was cut short is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise LaunchError(
                f"{path}:{number} is no JSON ({error})",
                code=ExitCode.NOT_FOUND,
                help="remove that line, or name another run",
            ) from error
        if isinstance(value, dict):
            yield value
