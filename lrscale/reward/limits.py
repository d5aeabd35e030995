"""How many calls may be in flight, how fast they may follow each other, and when a failed one is tried again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a pool keeps to."""

    workers: int = 4
    timeout_s: float = 60.0
    """Of a call, a sample's or a batch's."""
    start_timeout_s: float = 300.0
    batch_size: int = 1
    max_wait_s: float = 0.05
    retries: int = 2
    backoff_s: float = 1.0
    concurrency: int = 0
    """Calls in flight; 0 allows one a worker."""
    rate_per_s: float = 0.0
    """Calls a second; 0 sets no limit."""

    def wait_before(self, retry: int, asked_s: float) -> float:
        """Seconds before retry number `retry` (from 1), at least what the service asked for (an hour at most)."""
        return max(self.backoff_s * 2.0 ** (retry - 1), min(asked_s, 3600.0))


class Pace:
    """Spaces calls evenly: no burst after a pause."""

    def __init__(self, rate_per_s: float) -> None:
        self._gap_s = 1.0 / rate_per_s if rate_per_s else 0.0
        self._next = 0.0

    def wait(self, now: float) -> float:
        """Seconds until a call may begin; 0 where it may now."""
        return max(0.0, self._next - now)

    def take(self, now: float) -> None:
        """A call begins."""
        self._next = max(now, self._next) + self._gap_s
