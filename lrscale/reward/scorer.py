"""Scores completions: submitted one by one as they finish, waited for when the step's last one is in."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from lrscale.records import Prompt, Rollout, Score, ScoreFailed
from lrscale.reward.budget import FailureBudget
from lrscale.reward.pool import Pool
from lrscale.reward.rules import Shaping, TaskScore
from lrscale.reward.source import Sample
from lrscale.reward.stats import ScoringStats


class Scorer(Protocol):
    """Where completions go to be scored. A failed score is a ScoreFailed, never a 0.

    A score is a function of its sample alone: neither the order of arrival nor what is scored beside it counts.
    """

    budget: FailureBudget
    fingerprint: str
    """Changes with whatever decides the scores, as far as that can be seen from here (a user's file, the recipe)."""

    def begin(self, keys: Sequence[Hashable]) -> None:
        """The keys of the samples that will be handed in until all are drained, in the order of the data."""

    def submit(self, key: Hashable, prompt: Prompt, rollout: Rollout, completion: str) -> None:
        """Hand in a finished sample under a key of its own; `completion` is the decoded text."""

    def wait(self, timeout_s: float) -> bool:
        """Wait for the results of all samples handed in; whether they are there."""

    def drain(self) -> dict[Hashable, Score | ScoreFailed]:
        """Results that have come since the last drain, by key, in the order of submission.

        `parts["task"]` of a Score is the reward before shaping; see `Shaping.apply`.
        """

    def take_stats(self) -> ScoringStats | None:
        """What scoring cost since the last call; None where it costs nothing worth telling."""

    def close(self) -> None:
        """No more samples; ends whatever runs."""


class TaskScorer:
    """The task's own rule, applied at once in this process: exact, cheap, and it cannot hang."""

    def __init__(self, task_score: TaskScore, shaping: Shaping, fingerprint: str = "task") -> None:
        self.budget = FailureBudget()
        self.fingerprint = fingerprint
        self._task_score = task_score
        self._shaping = shaping
        self._scores: dict[Hashable, Score | ScoreFailed] = {}

    def begin(self, keys: Sequence[Hashable]) -> None:
        """Nothing to prepare."""

    def submit(self, key: Hashable, prompt: Prompt, rollout: Rollout, completion: str) -> None:
        if key in self._scores:
            raise ValueError(_TWICE.format(key))
        self._scores[key] = self._shaping.apply(self._task_score(prompt, completion), rollout, completion)

    def wait(self, timeout_s: float) -> bool:
        return True

    def drain(self) -> dict[Hashable, Score | ScoreFailed]:
        scores, self._scores = self._scores, {}
        return scores

    def take_stats(self) -> ScoringStats | None:
        return None

    def close(self) -> None:
        """Nothing runs."""


class PooledScorer:
    """A pool's results, matched with what was handed in."""

    def __init__(
        self,
        pool: Pool,
        shaping: Shaping,
        budget: FailureBudget,
        *,
        fingerprint: str,
        fixed_batches: bool = False,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits for the first worker; ValueError where the reward cannot be loaded.

        `fixed_batches`: calls are made up of samples that stand side by side in the data, whenever they finish.
        For models: the last bits of their answers depend on the batch.
        """
        self.budget = budget
        self.fingerprint = fingerprint
        self._pool = pool
        self._shaping = shaping
        self._fixed_batches = fixed_batches
        self._places: dict[Hashable, int] = {}
        self._batches: dict[int, dict[Hashable, Sample | None]] = {}
        self._pending: dict[Hashable, tuple[Rollout, str]] = {}
        self._checked: frozenset[str] | None = None
        self._wait_s = 0.0
        try:
            self._needs = pool.needs(on_wait=on_wait)
        except BaseException:
            pool.close()
            raise

    def begin(self, keys: Sequence[Hashable]) -> None:
        """Forgets what an earlier round that was broken off has left behind."""
        while self._pending:
            self._pool.wait(60.0)
            self.drain()
        self._places = {key: place for place, key in enumerate(keys)}
        self._batches = {}
        size = self._pool.limits.batch_size
        for place, key in enumerate(keys):
            self._batches.setdefault(place // size, {})[key] = None

    def submit(self, key: Hashable, prompt: Prompt, rollout: Rollout, completion: str) -> None:
        """As in Scorer; ValueError at the first sample whose columns the reward cannot be called with."""
        if key in self._pending:
            raise ValueError(_TWICE.format(key))
        if self._checked is None or self._checked != prompt.columns.keys():
            self._needs.check(prompt.columns)
            self._checked = frozenset(prompt.columns)
        self._pending[key] = (rollout, completion)
        sample = Sample(prompt, completion, rollout.completion_ids, rollout.completion_latent_steps)
        if not self._fixed_batches or key not in self._places:
            self._pool.submit(key, sample)
            return
        number = self._places[key] // self._pool.limits.batch_size
        batch = self._batches[number]
        batch[key] = sample
        if all(found is not None for found in batch.values()):
            self._submit_batch(number)

    def wait(self, timeout_s: float) -> bool:
        for number, batch in list(self._batches.items()):
            if self._fixed_batches and any(found is not None for found in batch.values()):
                self._submit_batch(number)  # the rest of it has a score already, or will never come
        started = time.perf_counter()
        try:
            return self._pool.wait(timeout_s)
        finally:
            self._wait_s += time.perf_counter() - started

    def drain(self) -> dict[Hashable, Score | ScoreFailed]:
        results = self._pool.take()
        done: dict[Hashable, Score | ScoreFailed] = {}
        for key in [key for key in self._pending if key in results]:
            rollout, completion = self._pending.pop(key)
            result = results[key]
            done[key] = self._shaping.apply(result, rollout, completion) if isinstance(result, Score) else result
        return done

    def take_stats(self) -> ScoringStats | None:
        stats = self._pool.take_stats()
        stats.wait_s, self._wait_s = self._wait_s, 0.0
        return stats

    def close(self) -> None:
        self._pool.close()

    def _submit_batch(self, number: int) -> None:
        batch = self._batches.pop(number)
        self._pool.submit_together([(key, sample) for key, sample in batch.items() if sample is not None])


_TWICE = "sample {!r} was submitted twice since the last drain"
