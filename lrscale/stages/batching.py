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
