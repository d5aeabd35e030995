"""Scores completions: submitted one by one as they finish, drained when the step's last one is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Iterable
from pathlib import Path
from typing import Protocol

from lrscale.config.rollout import FunctionRewardConfig, LengthPenaltyConfig, RewardConfig, TaskRewardConfig
from lrscale.records import Prompt, Rollout, Score, ScoreFailed
from lrscale.reward.functions import RewardFunction, Sample, load_reward_function
from lrscale.reward.rules import TaskScore, with_length_price


class RewardBudgetError(RuntimeError):
    """More scores failed than the recipe allows; training on what is left would be training on a biased sample."""


class Scorer(Protocol):
    """Where completions go to be scored. A failed score is a ScoreFailed, never a 0."""

    max_failed_share: float
    """Share of failed scores that a step may have, for `check_failures`."""

    def submit(self, key: Hashable, prompt: Prompt, rollout: Rollout, completion: str) -> None:
        """Hand in a finished sample under a key of its own; `completion` is the decoded text."""

    def drain(self) -> dict[Hashable, Score | ScoreFailed]:
        """Results of all samples handed in since the last drain, by key, in the order of submission.

        `parts["task"]` of a Score is the reward before the price of length, `parts["length"]` that
        price (0 or less); they add up to the value.
        """


class TaskScorer:
    """The task's own rule, applied at once."""

    def __init__(self, task_score: TaskScore, penalty: LengthPenaltyConfig) -> None:
        self.max_failed_share = 0.0
        self._task_score = task_score
        self._penalty = penalty
        self._scores: dict[Hashable, Score | ScoreFailed] = {}

    def submit(self, key: Hashable, prompt: Prompt, rollout: Rollout, completion: str) -> None:
        _refuse_twice(key, self._scores)
        self._scores[key] = with_length_price(self._task_score(prompt, completion), rollout, self._penalty)

    def drain(self) -> dict[Hashable, Score | ScoreFailed]:
        scores, self._scores = self._scores, {}
        return scores


class FunctionScorer:
    """A user's function, called in this process over all samples of a drain at once."""

    def __init__(self, function: RewardFunction, penalty: LengthPenaltyConfig, *, max_failed_share: float) -> None:
        self.max_failed_share = max_failed_share
        self._function = function
        self._penalty = penalty
        self._pending: dict[Hashable, tuple[Sample, Rollout]] = {}
        self._checked: frozenset[str] | None = None

    def submit(self, key: Hashable, prompt: Prompt, rollout: Rollout, completion: str) -> None:
        """As in Scorer; ValueError at the first sample whose columns the function cannot be called with."""
        _refuse_twice(key, self._pending)
        if self._checked is None or self._checked != prompt.columns.keys():
            self._function.check_columns(prompt.columns)
            self._checked = frozenset(prompt.columns)
        self._pending[key] = (Sample(prompt, completion, rollout.completion_ids), rollout)

    def drain(self) -> dict[Hashable, Score | ScoreFailed]:
        pending, self._pending = self._pending, {}
        results = self._function.score([sample for sample, _ in pending.values()])
        return {
            key: with_length_price(result, rollout, self._penalty) if isinstance(result, Score) else result
            for (key, (_, rollout)), result in zip(pending.items(), results, strict=True)
        }


def build_scorer(config: RewardConfig, task_score: TaskScore | None, *, recipe_dir: Path) -> Scorer:
    """The scorer that a recipe asks for.

    `task_score` is the task's rule, None for a task without one (jsonl). ValueError where the
    recipe asks for something that is not there.
    """
    if isinstance(config, TaskRewardConfig):
        if task_score is None:
            raise ValueError(
                "reward.kind is `task`, but this task has no answer rule of its own (jsonl). "
                "Set reward.kind: function and reward.path to a file with your reward function."
            )
        return TaskScorer(task_score, config.length_penalty)
    default_timeout = FunctionRewardConfig.model_fields["timeout_s"].default
    if config.timeout_s != default_timeout:
        raise ValueError(
            f"reward.timeout_s: given {config.timeout_s:g}, but reward functions run inside the training process, "
            f"where nothing can stop them. Leave it at {default_timeout:g}; the killable pool comes in a later release."
        )
    function = load_reward_function(recipe_dir / Path(config.path).expanduser(), config.name)
    return FunctionScorer(function, config.length_penalty, max_failed_share=config.max_failed_share)


def check_failures(scores: Iterable[Score | ScoreFailed], max_failed_share: float) -> int:
    """The number of failed scores, if the budget holds.

    Raises RewardBudgetError past it, with counts by kind and the first traceback.
    """
    everything = list(scores)
    failed = [score for score in everything if isinstance(score, ScoreFailed)]
    if len(failed) <= max_failed_share * len(everything):
        return len(failed)
    kinds = Counter(score.kind for score in failed)
    shown = next((score for score in failed if score.kind == "error"), failed[0])
    raise RewardBudgetError(
        f"{len(failed)} of {len(everything)} scores failed ({len(failed) / len(everything):.0%}; "
        f"reward.max_failed_share allows {max_failed_share:.0%}): "
        f"{', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}.\n"
        f"The first {shown.kind}: {shown.detail}\n"
        "Mend the reward function (or the rows it fails on), or allow more with reward.max_failed_share."
    )


def _refuse_twice(key: Hashable, known: Container[Hashable]) -> None:
    if key in known:
        raise ValueError(f"sample {key!r} was submitted twice since the last drain")
