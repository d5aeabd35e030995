"""The figures of a benchmark's runs, and what they come to over the seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lrscale.report.runs import Run, arm_title, load_runs
from lrscale.report.summary import Evaluation, summarise

ORDINARY = ("discrete_free", "discrete")
"""RL without latents: the first's gain, length and tokens are what others are held against. Where both were run, also
whichever came out better on a seed, since one that RL has ruined would flatter the latent arms."""
CONTROLS = ("zero_latent", "shuffled_latent")
LATENT = ("latent", "latent_free")


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """One arm of one seed."""

    arm: str
    seed: int
    before: Evaluation
    after: Evaluation
    longer: float | None
    """Accuracy on stories longer than those of training."""
    rl_tokens: int
    cpu_minutes: float

    def cells(self) -> tuple[str, ...]:
        after = self.after
        return (
            arm_title(self.arm),
            str(self.seed),
            f"{100 * self.before.accuracy:.1f}",
            f"{100 * after.accuracy:.1f} [{100 * after.low:.1f}, {100 * after.high:.1f}]",
            f"{self.before.tokens_mean:.1f} → {after.tokens_mean:.1f}",
            f"{self.before.latent_steps_mean:.1f} → {after.latent_steps_mean:.1f}",
            f"{self.before.length_mean:.1f} → {after.length_mean:.1f}",
            "–" if self.longer is None else f"{100 * self.longer:.1f}",  # noqa: RUF001 - stands for "none" in tables
            f"{self.rl_tokens:,}",
            f"{self.cpu_minutes:.1f}",
        )

    @staticmethod
    def mean_cells(figures: Sequence[ArmFigures]) -> tuple[str, ...]:
        """Mean over the seeds; the accuracy with the standard error over them."""

        def average(value: Callable[[ArmFigures], float]) -> float:
            return mean(value(figure) for figure in figures)

        accuracies = [100 * figure.after.accuracy for figure in figures]
        longer = [100 * figure.longer for figure in figures if figure.longer is not None]
        return (
            arm_title(figures[0].arm),
            "mean",
            f"{100 * average(lambda figure: figure.before.accuracy):.1f}",
            f"{mean(accuracies):.1f} (SE {standard_error(accuracies):.1f})",
            *(
                f"{average(lambda f, key=key: getattr(f.before, key)):.1f} → "
                f"{average(lambda f, key=key: getattr(f.after, key)):.1f}"
                for key in ("tokens_mean", "latent_steps_mean", "length_mean")
            ),
            f"{mean(longer):.1f}" if longer else "–",  # noqa: RUF001
            f"{average(lambda figure: figure.rl_tokens):,.0f}",
            f"{average(lambda figure: figure.cpu_minutes):.1f}",
        )


def arm_figures(run_dir: Path) -> list[ArmFigures]:
    """The finished arms of a run, in the order of its recipe."""
    (run,) = load_runs([run_dir])
    longer = longer_accuracies(run_dir)
    return [
        ArmFigures(
            arm=summary.arm,
            seed=int(run.recipe["seed"]),
            before=summary.before,
            after=summary.after,
            longer=longer.get(summary.arm),
            rl_tokens=summary.train_tokens or 0,
            cpu_minutes=cpu_minutes(run, summary.arm),
        )
        for summary in summarise([run])
        if summary.finished and summary.before and summary.after
    ]


def longer_accuracies(run_dir: Path) -> dict[str, float]:
    path = run_dir / "longer.json"
    if not path.is_file():
        return {}
    return {Path(line["model"]).name: float(line["accuracy"]) for line in json.loads(path.read_text())}


def cpu_minutes(run: Run, arm: str) -> float:
    """Of the arm's RL steps, evaluations apart from those inside it included."""
    ends: list[Any] = run.lines("arm", arm=arm)
    return float(ends[-1]["cpu_minutes"]) if ends else math.nan


def verdicts(figures: Sequence[ArmFigures]) -> list[str]:
    """What the issue at hand is judged by: gain kept, length, RL tokens, and the controls, paired by seed."""
    by_arm = {arm: {f.seed: f for f in figures if f.arm == arm} for arm in {f.arm for f in figures}}
    ordinary = {arm_title(arm): by_arm[arm] for arm in ORDINARY if arm in by_arm}
    if len(ordinary) > 1:
        seeds = set.intersection(*(set(arm) for arm in ordinary.values()))
        ordinary["the better of the two"] = {
            seed: max((arm[seed] for arm in ordinary.values()), key=lambda f: f.after.accuracy) for seed in seeds
        }
    lines = []
    for arm in (arm for arm in LATENT if arm in by_arm):
        for title, theirs in ordinary.items():
            seeds = by_arm[arm].keys() & theirs.keys()
            if seeds:
                pairs = [(by_arm[arm][seed], theirs[seed]) for seed in sorted(seeds)]
                lines.append(f"{arm_title(arm)} against {title}, {len(pairs)} seeds: {_against_ordinary(pairs)}")
        for control in (control for control in CONTROLS if control in by_arm):
            differences = [
                100 * (by_arm[arm][seed].after.accuracy - by_arm[control][seed].after.accuracy)
                for seed in sorted(by_arm[arm].keys() & by_arm[control].keys())
            ]
            lines.append(f"{arm_title(arm)} minus {arm_title(control)}, accuracy: {_difference(differences)}")
    return lines


def _against_ordinary(pairs: Sequence[tuple[ArmFigures, ArmFigures]]) -> str:
    """The gain is counted from the base model with its reasoning written out, before any RL.

    The share kept is that of the mean gains: a seed on which the other arm gains nothing would rule a mean of shares.
    """
    gains = [100 * (ours.after.accuracy - theirs.before.accuracy) for ours, theirs in pairs]
    theirs_gains = [100 * (theirs.after.accuracy - theirs.before.accuracy) for _, theirs in pairs]
    lengths = [100 * (1 - ours.after.length_mean / theirs.after.length_mean) for ours, theirs in pairs]
    tokens = [100 * ours.rl_tokens / theirs.rl_tokens for ours, theirs in pairs]
    return (
        f"gains {mean(gains):.1f} points where it gains {mean(theirs_gains):.1f} "
        f"({100 * mean(gains) / mean(theirs_gains):.0f} %; seed by seed "
        f"{', '.join(f'{100 * ours / theirs:.0f}' for ours, theirs in zip(gains, theirs_gains, strict=True))}), "
        f"{_spread(lengths)} % shorter, with {_spread(tokens)} % of its RL tokens"
    )


def _difference(differences: Sequence[float]) -> str:
    error = standard_error(differences)
    times = f", {mean(differences) / error:.1f} standard errors" if error else ""
    return f"{mean(differences):+.1f} points (SE {error:.1f} over {len(differences)} seeds{times})"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean over seeds; nan for one seed."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
