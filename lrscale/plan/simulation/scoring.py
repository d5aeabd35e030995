"""Workers that score finished sequences in the order in which they come."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import simpy


class ScoringPool:
    """Workers with one queue. A sample goes to whichever is free first; how long it takes is known beforehand."""

    def __init__(
        self, env: simpy.Environment, workers: int, latencies: Sequence[float], done: Callable[[int], None]
    ) -> None:
        """`latencies`: seconds of each sample of the step, by index; `done` is told each index as its score comes."""
        self._env = env
        self._latencies = latencies
        self._done = done
        self._free_at = [0.0] * workers
        self._left = len(latencies)
        self.busy_s = 0.0
        self.all_scored = env.event()
        """Succeeds with the last score."""

    def submit(self, index: int) -> None:
        """A sequence is finished."""
        took = self._latencies[index]
        self.busy_s += took
        # A queue in order of arrival, so the next free worker is known as soon as a sample comes.
        end = max(self._env.now, self._free_at[0]) + took
        heapq.heapreplace(self._free_at, end)
        if end <= self._env.now:
            self._scored(index)
        else:
            scored = self._env.timeout(end - self._env.now, index)
            assert scored.callbacks is not None
            scored.callbacks.append(lambda event: self._scored(index))

    def _scored(self, index: int) -> None:
        self._done(index)
        self._left -= 1
        if not self._left:
            self.all_scored.succeed()
