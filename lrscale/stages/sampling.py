"""Sampling groups and scoring them: each rollout is handed to the scorer as it finishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lrscale.config.stages import Arm
from lrscale.latent import LatentMode, LatentPolicy
from lrscale.parallel.lockstep import ALONE, Lockstep
from lrscale.parallel.ranks import Ranks
from lrscale.records import Prompt, Rollout, RolloutGroup, Score, ScoreFailed
from lrscale.report.timing import PhaseTimer
from lrscale.reward.scorer import Scorer, check_failures
from lrscale.rollout.engine import RolloutEngine, SamplingPlan
from lrscale.stages.exchange import Sample, exchange
from lrscale.stages.prompts import PromptBook
from lrscale.stages.run_log import Display


@dataclass(frozen=True, slots=True)
class ArmKind:
    """What sets an arm apart from the others; everything else is equal."""

    mode: LatentMode
    markers: bool
    """Whether its prompts carry the paragraph that tells of the marker."""

    @property
    def uses_projector(self) -> bool:
        return self.mode != "zero"


ARMS: dict[Arm, ArmKind] = {
    "latent": ArmKind("real", markers=True),
    "discrete": ArmKind("zero", markers=False),
    "zero_latent": ArmKind("zero", markers=True),
    "shuffled_latent": ArmKind("shuffled", markers=True),
}


def share(total: int, ranks: Ranks) -> range:
    """The samples that this rank takes: a stretch, so that a prompt is prefilled once for most of its group."""
    return range(total * ranks.rank // ranks.world_size, total * (ranks.rank + 1) // ranks.world_size)


class NonFiniteSampleError(RuntimeError):
    """A rollout holds a number that is not finite: the policy or the projector has diverged."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Turns prompts into scored groups."""

    rollouts: RolloutEngine
    scorer: Scorer
    book: PromptBook
    policy: LatentPolicy
    display: Display
    lockstep: Lockstep = ALONE

    def groups(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        plan: SamplingPlan,
        timer: PhaseTimer,
        *,
        label: str = "rollout",
    ) -> list[RolloutGroup]:
        """`group_size` samples of every prompt, in the order of the prompts, scored; `label` names the progress bar.

        Each rank samples and scores its share; all of them get all groups.

        Raises:
            RewardBudgetError: more scores failed than the recipe allows.
            NonFiniteSampleError: a latent or a log-probability is not finite.
        """
        total = len(prompts) * group_size
        mine = share(total, self.lockstep.ranks)
        ids = [self.book.ids(prompts[index // group_size]) for index in mine]
        found: dict[int, Rollout] = {}
        with self.lockstep.phase(label), self.display.progress(label, len(ids), unit="samples") as progress:
            with timer.phase("rollout"):
                stream = iter(self.rollouts.generate(ids, plan, row_keys=mine))
            # Handed in one by one, so that a scorer may work while others decode; one in this process makes them wait.
            while True:
                with timer.phase("rollout"):
                    place, rollout = next(stream, (-1, None))
                if rollout is None:
                    break
                index = mine[place]
                prompt = prompts[index // group_size]
                found[index] = rollout
                with timer.phase("score"):
                    self.scorer.submit(index, prompt, rollout, self.text(rollout))
                progress.advance()
                self.lockstep.tick()
        with timer.phase("score"), self.lockstep.phase("score"):
            scores = self.scorer.drain()
            samples = exchange(self.lockstep, {index: Sample(found[index], scores[index]) for index in mine})
        check_failures([samples[index].score for index in range(total)], self.scorer.max_failed_share)
        groups = []
        for first, prompt in zip(range(0, total, group_size), prompts, strict=True):
            group = [samples[first + sample] for sample in range(group_size)]
            for number, sample in enumerate(group):
                _refuse_non_finite(sample.rollout, prompt, number)
            groups.append(RolloutGroup(prompt, tuple(s.rollout for s in group), tuple(s.score for s in group)))
        return groups

    def text(self, rollout: Rollout) -> str:
        """The completion as text, markers included, special tokens left out."""
        return tokens_text(self.policy, rollout.completion_ids)


def tokens_text(policy: LatentPolicy, ids: Sequence[int]) -> str:
    """What token ids say. Bytes are joined before they are read, so characters cut by a token's edge survive."""
    return b"".join(map(policy.detector.token_bytes, ids)).decode(errors="replace")


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
