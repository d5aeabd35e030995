"""What a run that went before tells about the next one: lengths of completions, and what scoring took."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.config.arms import DISCRETE_ARMS
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.plan.lengths import Lengths
from lrscale.plan.simulation.lengths import AssumedLengths, Completion, MeasuredLengths, mean_completion

Seen = AssumedLengths | MeasuredLengths
"""Lengths around the means of a run, or its completions."""


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """What can be drawn from a run."""

    lengths: Mapping[str, Seen]
    """By arm."""
    prompt_tokens: float | None
    score_s: float | None
    """Mean seconds a score; None where the task's own rule scored."""

    def arm(self, arms: Sequence[str]) -> str:
        """The first of a recipe's arms that the run had too. Raises LaunchError where there is none."""
        known = next((arm for arm in arms if arm in self.lengths), None)
        if known is None:
            raise LaunchError(
                f"the recipe's arms are {', '.join(arms)}, of which that run has no lengths (it has "
                f"{', '.join(sorted(self.lengths))})",
                code=ExitCode.NOT_FOUND,
                help="name another run, or --set stages.rl.arms=[...]",
            )
        return known

    def other_than(self, arm: str) -> Seen | None:
        """Completions of an arm that reasons the other way (discrete for one with latents), where there was one."""
        discrete = arm in DISCRETE_ARMS
        return next((lengths for name, lengths in self.lengths.items() if (name in DISCRETE_ARMS) != discrete), None)

    def known(self, arms: Sequence[str]) -> dict[str, float | None]:
        """What `lrscale.plan.workload.workload` would assume otherwise, of the first of these arms that the run had.

        Raises:
            LaunchError: it had none of them.
        """
        source = self.lengths[self.arm(arms)]
        tokens, latents = mean_completion(source)
        return {
            "prompt_tokens": self.prompt_tokens,
            "mean_new_tokens": tokens + latents,
            "spread": source.spread,
            "latent_share": latents / (tokens + latents),
        }


def read_measured(run_dir: Path, limit: int, spread: float) -> MeasuredRun:
    """From rollouts/ARM-step-N.jsonl; where none were kept, from the means in metrics.jsonl.

    Args:
        run_dir: Of a run that has done RL steps.
        limit: Positions at which completions are cut: those of the run that is planned.
        spread: Of lengths around a mean, where the run kept no rollouts.

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
    lengths: dict[str, Seen] = {
        arm: MeasuredLengths(tuple(seen), f"{run_dir.name}, arm {arm}", limit) for arm, seen in completions.items()
    }
    lengths = {**_from_means(metrics, min(limit, _limit(run_dir)), spread), **lengths}
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


def _from_means(metrics: list[dict[str, Any]], limit: int, spread: float) -> dict[str, Seen]:
    """Log-normal lengths around the mean of an arm's RL steps."""
    means: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        if line.get("stage") == "rl" and isinstance(line.get("arm"), str) and line.get("tokens_mean"):
            means.setdefault(line["arm"], []).append((line["tokens_mean"], line.get("latent_steps_mean") or 0.0))
    found: dict[str, Seen] = {}
    for arm, steps in means.items():
        tokens, latents = (sum(values) for values in zip(*steps, strict=True))
        positions = tokens + latents
        found[arm] = AssumedLengths(Lengths(min(positions / len(steps), limit), limit, spread), latents / positions)
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
