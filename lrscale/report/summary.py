"""The figures a run is judged by, from its metrics alone: arms before and after, gain kept, held-out losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrscale.config.arms import DISCRETE_ARMS
from lrscale.report.metrics import Z_95, wilson_interval
from lrscale.report.runs import Metrics, Run, arm_title, section

NO_ERROR = "no error known (one prompt)"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of one arm on the held-out prompts."""

    step: int
    prompts: int
    accuracy: float
    low: float
    """95 % interval (Wilson)."""
    high: float
    tokens_mean: float
    """Discrete tokens a completion."""
    latent_steps_mean: float
    markers_mean: float | None
    no_answer_share: float | None
    marker_histogram: dict[int, int]
    """Completions by the number of markers in them."""
    steps_histogram: dict[int, int]
    """Markers by their number N."""

    @property
    def length_mean(self) -> float:
        """Positions a completion takes: discrete tokens plus latent steps."""
        return self.tokens_mean + self.latent_steps_mean

    @property
    def standard_error(self) -> float:
        """Of the accuracy, taken from the interval: never 0, also at 0 % and 100 %."""
        return (self.high - self.low) / (2.0 * Z_95)


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One arm of one run; None where the run has not come that far."""

    run: Run
    arm: str
    before: Evaluation | None
    after: Evaluation | None
    rl_steps: int
    train_tokens: int | None
    """Discrete tokens trained on."""
    train_positions: int | None
    """The same with latent steps counted."""
    minutes: float | None
    finished: bool


@dataclass(frozen=True, slots=True)
class GainKept:
    """How much of the discrete arm's gain an arm reaches, both counted from the base model's plain reasoning.

    share = (arm after - discrete before) / (discrete after - discrete before). The arm's own start
    is no fit reference: an arm that starts low because of its markers would "gain" by recovering.
    """

    arm: ArmSummary
    discrete: ArmSummary
    discrete_gain: float
    discrete_gain_low: float
    discrete_gain_high: float
    share: float | None
    """None where the discrete gain's 95 % interval includes 0, or the discrete arm lost: nothing to keep a share of."""
    share_low: float | None
    """95 % interval by Fieller's theorem (the two gains share the base's error)."""
    share_high: float | None
    token_ratio: float | None
    """RL training tokens of the arm over those of the discrete arm."""


@dataclass(frozen=True, slots=True)
class Heldout:
    """Held-out loss on the tokens after markers, with the latents real, zeroed, or shuffled over the batch."""

    arm: str | None
    """None: the first projector SFT, before any arm."""
    refresh: int
    step: int
    rows: int | None
    prompts: int | None
    """Prompts that the rows come from; None in runs that did not record it."""
    loss_real: float
    loss_real_se: float | None
    """This and the other errors: None where all rows come from one prompt, so that no error is known."""
    loss_zero: float | None
    loss_shuffled: float | None
    real_minus_zero: float | None
    real_minus_zero_se: float | None
    real_minus_shuffled: float | None
    real_minus_shuffled_se: float | None


def summarise(runs: Sequence[Run]) -> list[ArmSummary]:
    """One entry an arm, runs in the order given and arms in the order of their recipe."""
    return [_summarise_arm(run, arm) for run in runs for arm in run.arms]


def gains_kept(arms: Sequence[ArmSummary]) -> list[GainKept]:
    """For every arm but the discrete ones that was evaluated after RL and has a discrete arm to compare with.

    That is the discrete arm of its own run (the one that pays for length where there are two), else the only one among the runs with equal model,
    task and evaluation.
    """
    kept = []
    for arm in arms:
        discrete = _discrete_for(arm, arms)
        if arm.arm not in DISCRETE_ARMS and arm.after and discrete and discrete.before and discrete.after:
            kept.append(_gain_kept(arm, discrete, discrete.before, discrete.after, arm.after))
    return kept


def heldout_losses(run: Run) -> list[Heldout]:
    """Every held-out measurement of a run, oldest first."""
    # An error of 0 is how runs once recorded that there was one prompt: no certainty, but no error known.
    return [
        Heldout(
            arm=line.get("arm"),
            refresh=int(line.get("refresh") or 0),
            step=int(line["step"]),
            rows=line.get("rows"),
            prompts=line.get("prompts"),
            loss_real=float(line["loss_real"]),
            loss_real_se=line.get("loss_real_se") or None,
            loss_zero=line.get("loss_zero"),
            loss_shuffled=line.get("loss_shuffled"),
            real_minus_zero=line.get("real_minus_zero"),
            real_minus_zero_se=line.get("real_minus_zero_se") or None,
            real_minus_shuffled=line.get("real_minus_shuffled"),
            real_minus_shuffled_se=line.get("real_minus_shuffled_se") or None,
        )
        for line in run.lines("heldout")
        if line.get("loss_real") is not None
    ]


def gain_sentence(kept: GainKept, *others: GainKept) -> str:
    """What may be said about the share of the gain, and no more.

    `others`: further arms for which it is not defined either, over the same discrete arm; they share the sentence.
    """
    arm, discrete = kept.arm, kept.discrete
    title = arm_title(arm.arm)
    whose = "" if arm.run is discrete.run else f" (of run {discrete.run.label})"
    gain = (
        f"{100 * kept.discrete_gain:+.1f} points "
        f"[{100 * kept.discrete_gain_low:+.1f}, {100 * kept.discrete_gain_high:+.1f}]"
    )
    if kept.share is None:
        why = "it gained nothing" if kept.discrete_gain_high <= 0 else "its 95 % interval includes 0"
        text = (
            f"The share of the discrete arm's gain kept by the {_arms_words([kept, *others])} is not defined: "
            f"discrete RL{whose} moved accuracy by {gain}, and {why}."
        )
    else:
        low, high = 100 * (kept.share_low or 0.0), 100 * (kept.share_high or 0.0)
        share = f"{100 * kept.share:.0f} % [{low:.0f}, {high:.0f}]"
        if kept.share >= 0:
            text = f"The {title} arm keeps {share} of the discrete arm's gain{whose} of {gain}, measured from the same base."
        else:
            text = (
                f"The {title} arm keeps none of the discrete arm's gain{whose} of {gain}: "
                f"it ends below the base, at {share} of that gain."
            )
    for item in (kept, *others):
        if item.token_ratio is not None:
            who = f"The {arm_title(item.arm.arm)} arm" if others else "It"
            text += f" {who} trained on {item.token_ratio:.2f} times the discrete arm's RL tokens."
    if not (discrete.finished and all(item.arm.finished for item in (kept, *others))):
        text += " Not all of these arms are finished." if others else " Not both arms are finished."
    return text


def together(kept: Sequence[GainKept]) -> list[list[GainKept]]:
    """One list a sentence: arms of a run without a defined share have one reason, so it is said once."""
    lists: dict[object, list[GainKept]] = {}
    for number, item in enumerate(kept):
        key = number if item.share is not None else (id(item.arm.run), id(item.discrete))
        lists.setdefault(key, []).append(item)
    return list(lists.values())


def heldout_sentence(heldout: Heldout) -> str:
    """Whether the latents carry content, judged by the paired differences."""
    where = (
        "After projector SFT"
        if heldout.arm is None
        else f"After refresh {heldout.refresh} of the {arm_title(heldout.arm)} arm"
    )
    return f"{where}: " + "; ".join(
        [
            _difference_words("zeroed latents", heldout.real_minus_zero, heldout.real_minus_zero_se),
            _difference_words("shuffled latents", heldout.real_minus_shuffled, heldout.real_minus_shuffled_se),
        ]
    ) + "."  # fmt: skip


def ratio_interval(
    numerator: tuple[float, float], denominator: tuple[float, float], covariance: float
) -> tuple[float, float] | None:
    """Fieller's 95 % interval of numerator / denominator, each given as (mean, variance).

    None where the denominator is not told apart from 0: the interval is then unbounded.
    """
    top, top_variance = numerator
    bottom, bottom_variance = denominator
    z2 = Z_95 * Z_95
    # The ends r solve (top - r bottom)^2 = z^2 (top_variance - 2 r covariance + r^2 bottom_variance).
    a = bottom * bottom - z2 * bottom_variance
    if a <= 0.0:
        return None
    b = top * bottom - z2 * covariance
    c = top * top - z2 * top_variance
    spread = math.sqrt(max(0.0, b * b - a * c))
    return ((b - spread) / a, (b + spread) / a)


def _summarise_arm(run: Run, arm: str) -> ArmSummary:
    rl = run.lines("rl", arm=arm)
    ends = run.lines("arm", arm=arm)
    return ArmSummary(
        run=run,
        arm=arm,
        before=_evaluation(run.lines("evaluate", arm=arm, when="before")),
        after=_evaluation(run.lines("evaluate", arm=arm, when="after")),
        rl_steps=int(rl[-1]["step"]) if rl else 0,
        train_tokens=rl[-1].get("train_tokens_total") if rl else None,
        train_positions=rl[-1].get("train_positions_total") if rl else None,
        minutes=ends[-1].get("minutes") if ends else None,
        finished=bool(ends),
    )


def evaluation(line: Metrics) -> Evaluation:
    """An `evaluate` line of metrics.jsonl as a record."""
    prompts, accuracy = int(line.get("prompts") or 0), float(line["accuracy"])
    low, high = wilson_interval(accuracy * prompts, prompts)
    return Evaluation(
        step=int(line["step"]),
        prompts=prompts,
        accuracy=accuracy,
        low=float(line.get("accuracy_low", low)),
        high=float(line.get("accuracy_high", high)),
        tokens_mean=float(line.get("tokens_mean") or 0.0),
        latent_steps_mean=float(line.get("latent_steps_mean") or 0.0),
        markers_mean=line.get("markers_mean"),
        no_answer_share=line.get("no_answer_share"),
        marker_histogram={int(key): int(count) for key, count in (line.get("marker_histogram") or {}).items()},
        steps_histogram={int(key): int(count) for key, count in (line.get("steps_histogram") or {}).items()},
    )


def _evaluation(lines: Sequence[Metrics]) -> Evaluation | None:
    usable = [line for line in lines if line.get("accuracy") is not None]
    return evaluation(usable[-1]) if usable else None


def _discrete_for(arm: ArmSummary, arms: Sequence[ArmSummary]) -> ArmSummary | None:
    evaluated = [other for other in arms if other.before and other.after]
    candidates = [other for name in DISCRETE_ARMS for other in evaluated if other.arm == name]
    own = [other for other in candidates if other.run is arm.run]
    if own:
        return own[0]
    alike = [other for other in candidates if compared_on(other.run) == compared_on(arm.run)]
    return alike[0] if len(alike) == 1 else None


def compared_on(run: Run) -> list[object]:
    """What two runs must share for their accuracies to be compared: model, task and evaluation."""
    parts = ("model",), ("task",), ("stages", "evaluate")
    return [dict(section(run.recipe, *names)) for names in parts]


def _gain_kept(arm: ArmSummary, discrete: ArmSummary, base: Evaluation, best: Evaluation, own: Evaluation) -> GainKept:
    """The evaluations share their prompts; taking them for independent makes the intervals wider, not narrower."""
    base_variance = base.standard_error**2
    gain, gain_variance = best.accuracy - base.accuracy, best.standard_error**2 + base_variance
    spread = Z_95 * math.sqrt(gain_variance)
    interval = None
    if gain > 0:
        kept = (own.accuracy - base.accuracy, own.standard_error**2 + base_variance)
        interval = ratio_interval(kept, (gain, gain_variance), base_variance)
    ratio = None
    if arm.train_tokens is not None and discrete.train_tokens:
        ratio = arm.train_tokens / discrete.train_tokens
    return GainKept(
        arm=arm,
        discrete=discrete,
        discrete_gain=gain,
        discrete_gain_low=gain - spread,
        discrete_gain_high=gain + spread,
        share=(own.accuracy - base.accuracy) / gain if interval else None,
        share_low=interval[0] if interval else None,
        share_high=interval[1] if interval else None,
        token_ratio=ratio,
    )


def _arms_words(kept: Sequence[GainKept]) -> str:
    *first, last = [arm_title(item.arm.arm) for item in kept]
    return f"{', '.join(first)} and {last} arms" if first else f"{last} arm"


def _difference_words(control: str, difference: float | None, error: float | None) -> str:
    if difference is None:
        return f"no measurement against {control}"
    if error is None:
        return f"no verdict on real latents against {control} (paired difference {difference:+.4f}, {NO_ERROR})"
    measured = f"(paired difference {difference:+.4f}, standard error {error:.4f})"
    if abs(difference) <= Z_95 * error:
        return f"real latents are not told apart from {control} {measured}"
    return f"real latents are {'better' if difference < 0 else 'worse'} than {control} {measured}"
