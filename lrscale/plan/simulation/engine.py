"""An engine that decodes many rows side by side: one event a change of its batch, not one a token."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import simpy

from lrscale.plan.simulation.scenario import Costs


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence to generate."""

    index: int
    """In its step."""
    prompt: int
    """Index of its prompt: rows of one prompt share its prefill."""
    prompt_tokens: int
    positions: int
    """Tokens and latent steps to decode."""


@dataclass(slots=True)
class Engine:
    """Decodes its requests in their order, as many side by side as it holds.

    Between two changes of the batch its rows are the same and their contexts grow by one a position, so n positions take
    n times the cost at the middle of the stretch; exact where the cost is linear in the context, as the reading of keys
    and values is.
    """

    env: simpy.Environment
    costs: Costs
    continuous: bool
    work: Callable[[float], None]
    """Told of seconds of work as they are done."""

    def run(self, requests: deque[Request], finished: Callable[[Request], None]) -> Generator[simpy.Event, None, None]:
        """All requests, from the first prefill to the last row. `requests` is emptied."""
        rows: list[tuple[int, int, Request]] = []
        """(decoded positions of the engine at which it ends, index, request), as a heap."""
        decoded, behind = 0, 0
        """`behind`: sum over rows of prompt length less the engine's positions at which the row began."""
        warm: set[int] = set()
        while requests or rows:
            fresh = 0
            while requests and len(rows) < self.costs.max_rows and (self.continuous or not rows or fresh):
                request = requests.popleft()
                if request.prompt not in warm or not self.costs.shared_prefill:
                    warm.add(request.prompt)
                    fresh += request.prompt_tokens
                heapq.heappush(rows, (decoded + request.positions, request.index, request))
                behind += request.prompt_tokens - decoded
            if fresh:
                yield self._spend(fresh / self.costs.prefill_tokens_per_s)
            count = rows[0][0] - decoded
            if count > 0:
                context = behind / len(rows) + decoded + (count - 1) / 2
                yield self._spend(count * self.costs.decode_s(len(rows), context))
            decoded += count
            while rows and rows[0][0] <= decoded:
                end, _, request = heapq.heappop(rows)
                behind -= request.prompt_tokens - (end - request.positions)
                finished(request)

    def _spend(self, seconds: float) -> simpy.Event:
        self.work(seconds)
        return self.env.timeout(seconds)
