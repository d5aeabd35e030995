"""Rows to right-padded tensors, and to micro-batches under a budget of positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrscale.config.optimisation import SEEN_BUDGETS


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and the attention mask [B, T]; the mask comes from lengths, never from ids."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
    lengths_B1 = torch.tensor([[len(row)] for row in rows])
    mask_BT = (torch.arange(width) < lengths_B1).long()
    return ids_BT.to(device), mask_BT.to(device)


def micro_batches(
    lengths: Sequence[int], budget: int, *, least_rows: int = 1, prefixes: Sequence[tuple[int, ...]] | None = None
) -> list[list[int]]:
    """Indices of rows, cut so that rows x longest row stays within `budget` positions.

    Rows of similar length stand together (longest first, so that running out of memory shows at
    once). A batch never has fewer than `least_rows` rows where there are that many, whatever the budget.

    With `prefixes`, the tokens in front of each row's own, equal ones count once a batch; rows then stand together by
    prefix instead, where that comes to fewer positions in all.
    """
    sizes = _Sizes(lengths, prefixes)
    rows = range(len(lengths))
    cuts = [_cut(sorted(rows, key=lambda i: (-lengths[i], i)), sizes, budget, least_rows)]
    if prefixes is not None:
        cuts.append(_cut(sorted(rows, key=lambda i: (sizes.prefix_B[i], -lengths[i], i)), sizes, budget, least_rows))
    return min(cuts, key=lambda batches: sum(map(sizes.cost, batches)))


def rounds(lengths: Sequence[int], budget: int, ranks: int, *, least_rows: int = 1) -> list[list[list[int]]]:
    """Micro-batches for `ranks` processes that run side by side: one list a round, in it one list of rows a rank.

    The micro-batches of a round cost about the same, since all ranks wait for the slowest of it. Where rows do
    not go round, a rank's list is empty: it runs padding. For one rank these are `micro_batches`.
    """
    batches = micro_batches(lengths, budget, least_rows=least_rows)
    if ranks == 1:
        return [[batch] for batch in batches]
    sizes = _Sizes(lengths)
    while len(batches) % ranks and _split_largest(batches, sizes, least_rows):
        pass
    batches.sort(key=lambda batch: -sizes.cost(batch))
    batches += [[] for _ in range(-len(batches) % ranks)]
    return [batches[first : first + ranks] for first in range(0, len(batches), ranks)]


def positions_run(
    batches: Sequence[Sequence[int]], lengths: Sequence[int], prefixes: Sequence[tuple[int, ...]] | None = None
) -> int:
    """Positions that micro-batches take, padding counted, and equal prefixes once each."""
    return sum(map(_Sizes(lengths, prefixes).cost, batches))


class _Sizes:
    """What batches of rows cost."""

    def __init__(self, lengths: Sequence[int], prefixes: Sequence[tuple[int, ...]] | None = None) -> None:
        self._lengths = lengths
        prefixes = prefixes or [()] * len(lengths)
        number = {prefix: index for index, prefix in enumerate(sorted(set(prefixes), key=lambda p: (-len(p), p)))}
        self.prefix_B = [number[prefix] for prefix in prefixes]
        """Which prefix stands in front of a row, the longest being 0."""
        self._before = [len(prefix) for prefix in number]

    def cost(self, batch: Sequence[int]) -> int:
        """Positions that a batch takes, padding counted."""
        prefixes = {self.prefix_B[index] for index in batch}
        before = max((self._before[prefix] for prefix in prefixes), default=0)
        return max((self._lengths[index] for index in batch), default=0) * len(batch) + before * len(prefixes)

    def fits(self, batch: Sequence[int], budget: int) -> bool:
        seen = max(self._lengths[index] + self._before[self.prefix_B[index]] for index in batch) * len(batch)
        return self.cost(batch) <= budget and seen <= SEEN_BUDGETS * budget


def _cut(order: Sequence[int], sizes: _Sizes, budget: int, least_rows: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) < least_rows or sizes.fits([*batches[-1], index], budget)):
            batches[-1].append(index)
        else:
            batches.append([index])
    if len(batches) > 1 and len(batches[-1]) < least_rows:
        batches[-2] += batches.pop()
    return batches


def _split_largest(batches: list[list[int]], sizes: _Sizes, least_rows: int) -> bool:
    """Cut the most expensive batch that can be cut in two; whether there was one."""
    divisible = [index for index, batch in enumerate(batches) if len(batch) >= 2 * least_rows]
    if not divisible:
        return False
    index = max(divisible, key=lambda i: sizes.cost(batches[i]))
    batch = batches[index]
    half = max(least_rows, len(batch) // 2)  # the longer rows stand first: their half is no smaller
    batches[index : index + 1] = [batch[:half], batch[half:]]
    return True
