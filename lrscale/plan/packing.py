"""How rows of an update fall into micro-batches, and those into rounds of all ranks.

What `lrscale.stages.batching.rounds` does, by lengths alone: a batch is padded to its longest row, and every rank waits
for the dearest batch of a round.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Packed(NamedTuple):
    """Micro-batches of all ranks."""

    positions: int
    """That ranks run or wait for, padding counted."""
    rounds: int
    """Micro-batches that a rank runs."""


@lru_cache(maxsize=64)
def packed(lengths: tuple[int, ...], budget: int, ranks: int, minibatches: int = 1) -> Packed:
    """Rows of so many positions, in so many optimizer steps of about the same mixture of rows."""
    ordered = sorted(lengths, reverse=True)
    parts = [_rounds(ordered[start::minibatches], budget, ranks) for start in range(minibatches)]
    return Packed(
        ranks * sum(sum(costs) for costs in parts),
        sum(map(len, parts)),
    )


def _rounds(ordered: Sequence[int], budget: int, ranks: int) -> list[int]:
    """The dearest micro-batch of every round; `ordered` are lengths, the longest first."""
    batches = _cut(ordered, budget)
    queue = [(-ordered[first] * (last - first), first, last) for first, last in batches if last - first > 1]
    whole = [ordered[first] for first, last in batches if last - first == 1]
    heapq.heapify(queue)
    while (len(queue) + len(whole)) % ranks and queue:
        _, first, last = heapq.heappop(queue)
        middle = first + (last - first) // 2
        for start, end in ((first, middle), (middle, last)):
            if end - start > 1:
                heapq.heappush(queue, (-ordered[start] * (end - start), start, end))
            else:
                whole.append(ordered[start])
    costs = sorted([*whole, *(-cost for cost, _, _ in queue)], reverse=True)
    return costs[::ranks]


def _cut(ordered: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Rows from first to before last of each batch: as many as stay within the budget, at least one."""
    batches, first = [], 0
    while first < len(ordered):
        last = min(len(ordered), first + max(1, budget // ordered[first]))
        batches.append((first, last))
        first = last
    return batches
