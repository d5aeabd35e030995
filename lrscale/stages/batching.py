"""Rows to right-padded tensors, and to micro-batches under a budget of positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and the attention mask [B, T]; the mask comes from lengths, never from ids."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
    lengths_B1 = torch.tensor([[len(row)] for row in rows])
    mask_BT = (torch.arange(width) < lengths_B1).long()
    return ids_BT.to(device), mask_BT.to(device)


def micro_batches(lengths: Sequence[int], budget: int, *, least_rows: int = 1) -> list[list[int]]:
    """Indices of rows, cut so that rows x longest row stays within `budget` positions.

    Rows of similar length stand together (longest first, so that running out of memory shows at
    once). A batch never has fewer than `least_rows` rows where there are that many, whatever the budget.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) < least_rows or lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget):
            batches[-1].append(index)
        else:
            batches.append([index])
    if len(batches) > 1 and len(batches[-1]) < least_rows:
        batches[-2] += batches.pop()
    return batches


def rounds(lengths: Sequence[int], budget: int, ranks: int, *, least_rows: int = 1) -> list[list[list[int]]]:
    """Micro-batches for `ranks` processes that run side by side: one list a round, in it one list of rows a rank.

    The micro-batches of a round cost about the same, since all ranks wait for the slowest of it. Where rows do
    not go round, a rank's list is empty: it runs padding. For one rank these are `micro_batches`.
    """
    batches = micro_batches(lengths, budget, least_rows=least_rows)
    if ranks == 1:
        return [[batch] for batch in batches]
    while len(batches) % ranks and _split_largest(batches, lengths, least_rows):
        pass
    batches.sort(key=lambda batch: -_cost(batch, lengths))
    batches += [[] for _ in range(-len(batches) % ranks)]
    return [batches[first : first + ranks] for first in range(0, len(batches), ranks)]


def _split_largest(batches: list[list[int]], lengths: Sequence[int], least_rows: int) -> bool:
    """Cut the most expensive batch that can be cut in two; whether there was one."""
    divisible = [index for index, batch in enumerate(batches) if len(batch) >= 2 * least_rows]
    if not divisible:
        return False
    index = max(divisible, key=lambda i: _cost(batches[i], lengths))
    batch = batches[index]
    half = max(least_rows, len(batch) // 2)  # the longer rows stand first: their half is no smaller
    batches[index : index + 1] = [batch[:half], batch[half:]]
    return True


def _cost(batch: Sequence[int], lengths: Sequence[int]) -> int:
    """Positions that a batch takes, padding counted."""
    return max((lengths[index] for index in batch), default=0) * len(batch)
