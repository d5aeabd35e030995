"""Sampling groups and scoring them: each rollout is handed to the scorer as it finishes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lrscale.config.arms import Arm
from lrscale.latent import LatentMode, LatentPolicy
from lrscale.parallel.lockstep import ALONE, Lockstep
from lrscale.parallel.ranks import Ranks
from lrscale.records import Prompt, Rollout, RolloutGroup, Score, ScoreFailed
from lrscale.report.timing import PhaseTimer, StageProgress
from lrscale.reward.scorer import Scorer
from lrscale.reward.stats import over_ranks
from lrscale.rollout.engine import RolloutEngine, SamplingPlan
from lrscale.stages.exchange import Sample, exchange
from lrscale.stages.pending import PendingRollouts
from lrscale.stages.prompts import PromptBook
from lrscale.stages.rollout_io import tokens_text
from lrscale.stages.run_log import Display
from lrscale.stages.scoring import ScoringRound


@dataclass(frozen=True, slots=True)
class ArmKind:
    """What sets an arm apart from the others; everything else is equal."""

    mode: LatentMode
    markers: bool
    """Whether its prompts carry the paragraph that tells of the marker."""
    priced: bool = True
    """Whether RL takes the price of length (`reward.length_penalty`) off its rewards."""

    @property
    def uses_projector(self) -> bool:
        return self.mode != "zero"


ARMS: dict[Arm, ArmKind] = {
    "latent": ArmKind("real", markers=True),
    "discrete": ArmKind("zero", markers=False),
    "zero_latent": ArmKind("zero", markers=True),
    "shuffled_latent": ArmKind("shuffled", markers=True),
    "latent_free": ArmKind("real", markers=True, priced=False),
    "discrete_free": ArmKind("zero", markers=False, priced=False),
}


def share(total: int, ranks: Ranks) -> range:
    """The samples that this rank takes: a stretch, so that a prompt is prefilled once for most of its group."""
    return range(total * ranks.rank // ranks.world_size, total * (ranks.rank + 1) // ranks.world_size)


class NonFiniteSampleError(RuntimeError):
    """A rollout holds a number that is not finite: the policy or the projector has diverged."""


@dataclass(frozen=True, slots=True)
class Occasion:
    """What samples are drawn for."""

    label: str = "rollout"
    """For the progress bar."""
    name: str = ""
    """Tells these samples from all others of the run."""
    failed_steps: int = 0
    """How many steps right before had failed scores."""


SOME_OCCASION = Occasion()


@dataclass(frozen=True, slots=True)
class Sampler:
    """Turns prompts into scored groups."""

    rollouts: RolloutEngine
    scorer: Scorer
    book: PromptBook
    policy: LatentPolicy
    display: Display
    lockstep: Lockstep = ALONE
    pending: PendingRollouts = field(default_factory=PendingRollouts)

    def groups(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        plan: SamplingPlan,
        timer: PhaseTimer,
        occasion: Occasion = SOME_OCCASION,
    ) -> list[RolloutGroup]:
        """`group_size` samples of every prompt, in the order of the prompts, scored.

        Each rank samples and scores its share; all of them get all groups.

        Raises:
            RewardBudgetError: more scores failed than the recipe allows. The rollouts are kept: the same call in a
                later attempt scores them anew.
            NonFiniteSampleError: a latent or a log-probability is not finite.
        """
        total = len(prompts) * group_size
        mine = share(total, self.lockstep.ranks)
        ids = [self.book.ids(prompts[index // group_size]) for index in mine]
        identity = {"name": occasion.name, **self._identity(ids, mine, plan)}
        before = self.pending.load(identity, self.scorer.fingerprint)
        whole = not self.lockstep.any(flag=len(before) < len(mine))
        scoring = ScoringRound(self.scorer, self.pending, identity, mine, before)
        try:
            with self.lockstep.phase(occasion.label), self._progress(occasion, len(ids)) as progress:
                for index, rollout in self._rollouts(ids, mine, plan, timer, before if whole else {}):
                    with timer.phase("score"):  # in workers of its own, while others decode
                        scoring.add(index, prompts[index // group_size], rollout, self.text(rollout))
                    progress.advance()
                    self.lockstep.tick()
            with timer.phase("rollout"), self.lockstep.phase(f"latents of {occasion.label}"):
                done = self.rollouts.complete([scoring.rollouts[index] for index in mine])  # while scores are computed
                scoring.complete(dict(zip(mine, done, strict=True)))
            with timer.phase("score"), self.lockstep.phase("score"):
                samples = exchange(self.lockstep, scoring.wait(self.lockstep, self.display))
            scores = [samples[index].score for index in range(total)]
            self.scorer.budget.check(scores, failed_steps=occasion.failed_steps)
        except BaseException:
            scoring.keep()
            raise
        self.pending.clear(identity)
        groups = []
        for first, prompt in zip(range(0, total, group_size), prompts, strict=True):
            group = [samples[first + sample] for sample in range(group_size)]
            for number, sample in enumerate(group):
                _refuse_non_finite(sample.rollout, prompt, number)
            groups.append(RolloutGroup(prompt, tuple(s.rollout for s in group), tuple(s.score for s in group)))
        return groups

    def scoring_metrics(self) -> dict[str, Any] | None:
        """What scoring cost since the last call, over all ranks; None where it costs nothing. Collective."""
        stats = self.scorer.take_stats()
        return None if stats is None else over_ranks(self.lockstep.gather_json(stats.to_json()))

    def _progress(self, occasion: Occasion, count: int) -> AbstractContextManager[StageProgress]:
        return self.display.progress(occasion.label, count, unit="samples")

    def _rollouts(
        self,
        ids: Sequence[Sequence[int]],
        mine: range,
        plan: SamplingPlan,
        timer: PhaseTimer,
        before: dict[int, Sample],
    ) -> Iterator[tuple[int, Rollout]]:
        """(index in the step, rollout) as they finish, or all those of an earlier attempt."""
        if before:
            yield from ((index, before[index].rollout) for index in mine)
            return
        with timer.phase("rollout"):
            stream = iter(self.rollouts.generate(ids, plan, row_keys=mine))
        while True:
            with timer.phase("rollout"):
                place, rollout = next(stream, (-1, None))
            if rollout is None:
                return
            yield mine[place], rollout

    def _identity(self, ids: Sequence[Sequence[int]], mine: range, plan: SamplingPlan) -> dict[str, Any]:
        """Everything that decides the rollouts of this rank, but for the recipe, which a run never changes."""
        return {
            "version": self.rollouts.version,
            "plan": asdict(plan),
            "prompts": hashlib.sha256(json.dumps([list(row) for row in ids]).encode()).hexdigest(),
            "rows": [mine.start, mine.stop],
            "world_size": self.lockstep.ranks.world_size,
        }

    def text(self, rollout: Rollout) -> str:
        """The completion as text, markers included, special tokens left out."""
        return tokens_text(self.policy, rollout.completion_ids)


def completion_markers(policy: LatentPolicy, rollout: Rollout) -> list[int]:
    """The number N of every marker of the completion, whether or not latent steps followed it."""
    sequence = (*rollout.prompt_ids, *rollout.completion_ids)
    first = len(rollout.prompt_ids) - 1  # a marker that ends the prompt takes its steps in the completion
    return [span.steps for span in policy.detector.find(sequence) if span.position >= first]


def task_value(score: Score) -> float:
    """The reward before any price of length: accuracy and the choice of traces never depend on length."""
    return score.parts.get("task", score.value)


def is_right(score: Score | ScoreFailed) -> bool:
    """Whether the sample earned a positive reward, length aside."""
    return isinstance(score, Score) and task_value(score) > 0.0


def mean(values: Sequence[float]) -> float | None:
    """The mean, None (null in metrics) where there is nothing to average."""
    return sum(values) / len(values) if values else None


def _refuse_non_finite(rollout: Rollout, prompt: Prompt, sample: int) -> None:
    for name, values in (("latent", rollout.latents_LH), ("log-probability", rollout.logprobs_T)):
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteSampleError(
                f"a {name} of prompt {prompt.prompt_id}, sample {sample}, is not finite. "
                "Lower the learning rate, or use projector.kind: normalised where latents explode"
            )
