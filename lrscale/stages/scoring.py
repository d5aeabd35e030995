"""One round of samples on this rank, from rollout to score."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrscale.parallel.lockstep import Lockstep
from lrscale.records import Prompt, Rollout, Score, ScoreFailed
from lrscale.reward.scorer import Scorer
from lrscale.stages.exchange import Sample
from lrscale.stages.pending import PendingRollouts
from lrscale.stages.run_log import Display, logger

_MEETING_S = 1.0
"""Ranks that wait for scores meet this often, so that none of them sits in a collective for as long as a judge takes."""
_KEEP_EVERY_S = 5.0
"""A longer wait has rollouts and scores on disk so often: not even a kill loses more of a judge's work."""
_LOGGED_FAILURES = 20


@dataclass(slots=True)
class ScoringRound:
    """Hands samples to the scorer and collects their scores; keeps them where that is broken off."""

    scorer: Scorer
    pending: PendingRollouts
    identity: Mapping[str, Any]
    """What decides the rollouts."""
    keys: Sequence[int]
    before: Mapping[int, Sample]
    """What an earlier attempt left."""
    prompt_ids: dict[int, str] = field(default_factory=dict)
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    scores: dict[int, Score | ScoreFailed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scorer.begin(self.keys)

    def add(self, index: int, prompt: Prompt, rollout: Rollout, text: str) -> None:
        """A finished rollout; one that an earlier attempt scored is not scored again."""
        self.rollouts[index] = rollout
        self.prompt_ids[index] = prompt.prompt_id
        known = self.before.get(index)
        if known is not None and isinstance(known.score, Score) and same_tokens(known.rollout, rollout):
            self.scores[index] = known.score
        else:
            self.scorer.submit(index, prompt, rollout, text)

    def complete(self, rollouts: Mapping[int, Rollout]) -> None:
        """The same rollouts with more in them than scoring needed."""
        self.rollouts |= rollouts

    def wait(self, lockstep: Lockstep, display: Display) -> dict[int, Sample]:
        """All samples of this rank, once every rank has its own scored. Collective."""
        kept_at, kept_scores = time.monotonic(), -1
        with display.progress("score", len(self.keys), unit="samples") as progress:
            while True:
                done = self.scorer.wait(_MEETING_S)
                progress.advance(self._collect())
                lockstep.tick()
                if not lockstep.any(flag=not done):
                    break
                if time.monotonic() - kept_at > _KEEP_EVERY_S and len(self.scores) > kept_scores:
                    self.keep()
                    kept_at, kept_scores = time.monotonic(), len(self.scores)
        self._log_failures()
        return {index: Sample(self.rollouts[index], self.scores[index]) for index in self.keys}

    def keep(self) -> None:
        """Put what there is on disk; whatever ended the round must not be hidden by a disk that refuses."""
        try:
            self._collect()
            samples = {index: Sample(rollout, self.scores.get(index)) for index, rollout in self.rollouts.items()}
            self.pending.keep(self.identity, self.scorer.fingerprint, samples)
        except (OSError, RuntimeError) as error:
            logger.info("rollouts that wait for scores could not be kept: %s", error)

    def _collect(self) -> int:
        new = self.scorer.drain()
        self.scores |= new  # type: ignore[arg-type]
        return len(new)

    def _log_failures(self) -> None:
        failed = [(index, score) for index, score in sorted(self.scores.items()) if isinstance(score, ScoreFailed)]
        for index, score in failed[:_LOGGED_FAILURES]:
            where = f"prompt {self.prompt_ids[index]}, sample {index}"
            logger.info("score failed (%s), %s: %s", score.kind, where, score.detail)
        if len(failed) > _LOGGED_FAILURES:
            logger.info("%d more scores failed", len(failed) - _LOGGED_FAILURES)


def same_tokens(one: Rollout, other: Rollout) -> bool:
    """Whether a score of one holds for the other."""
    return (
        one.completion_ids == other.completion_ids
        and one.prompt_ids == other.prompt_ids
        and one.latent_spans == other.latent_spans
    )
