"""Where tokens and latents stand in a row: from token columns to model positions and back.

A row of T tokens with markers of N_1..N_k takes S = T + sum N positions (method, section 4).
Ranks count a row's real tokens from 0; columns are those of the padded input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrscale.records import LatentSpan

Spans = tuple[LatentSpan, ...]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows with their padding moved behind the tokens."""

    ids_BT: Tensor
    """[B, T] token ids, right-padded with whatever the padding held."""
    lengths_B: Tensor
    """[B] real tokens."""
    rank_BT: Tensor
    """[B, T] rank of the token in each column of the INPUT; 0 at padding."""


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> PackedRows:
    """Token ids of each row, padded on the right to the longest, or to one column where all are empty."""
    width = max(1, *map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    column_T = torch.arange(width, device=device)
    return PackedRows(ids_BT, lengths_B, column_T * (column_T < lengths_B[:, None]))


def pack_rows(input_ids_BT: Tensor, attention_mask_BT: Tensor) -> PackedRows:
    """Left-, right- or un-padded rows to right-padded ones.

    Raises:
        ValueError: shapes differ, or a row has no tokens.
    """
    if input_ids_BT.dim() != 2 or input_ids_BT.shape != attention_mask_BT.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids_BT.shape)} and attention_mask {tuple(attention_mask_BT.shape)} "
            "must both be [rows, tokens]"
        )
    real_BT = attention_mask_BT.bool()
    lengths_B = real_BT.sum(1)
    if (lengths_B == 0).any():
        raise ValueError(f"row {int((lengths_B == 0).nonzero()[0])} has no tokens: its attention mask is all 0")
    order_BT = torch.argsort(~real_BT, dim=1, stable=True)
    rank_BT = (real_BT.cumsum(1) - 1).clamp(min=0) * real_BT
    return PackedRows(input_ids_BT.gather(1, order_BT), lengths_B, rank_BT)


@dataclass(frozen=True, slots=True)
class Placement:
    """Positions of right-packed tokens and of the latents between them."""

    token_BT: Tensor
    """[B, T] position of each token's own input."""
    read_BT: Tensor
    """[B, T] position whose logits predict the next token: z_N's for a marker's last token, else the token's own."""
    is_latent_BS: Tensor
    """[B, S] where latents stand; row-major order is the order of the recorded latents."""


def place(spans: Sequence[Spans], lengths_B: Tensor, tokens: int) -> Placement:
    """Place `tokens` columns of right-packed rows around the latent runs of `spans` (positions are ranks)."""
    device = lengths_B.device
    steps_BT = torch.zeros(len(spans), tokens, dtype=torch.long)
    for row, row_spans in enumerate(spans):
        for span in row_spans:
            steps_BT[row, span.position] = span.steps
    steps_BT = steps_BT.to(device)
    token_BT = torch.arange(tokens, device=device) + steps_BT.cumsum(1) - steps_BT
    total_B = lengths_B + steps_BT.sum(1)
    is_latent_BS = torch.arange(int(total_B.max()), device=device) < total_B[:, None]
    real_BT = torch.arange(tokens, device=device) < lengths_B[:, None]
    rows_BT = torch.arange(len(spans), device=device)[:, None].expand_as(token_BT)
    is_latent_BS[rows_BT[real_BT], token_BT[real_BT]] = False
    return Placement(token_BT, token_BT + steps_BT, is_latent_BS)


def gather_positions(hidden_BSH: Tensor, position_BT: Tensor) -> Tensor:
    """[B, S, H] and [B, T] positions to [B, T, H]."""
    rows, slots = hidden_BSH.shape[:2]
    flat_BT = torch.arange(rows, device=position_BT.device)[:, None] * slots + position_BT
    # As rows of a table: the gradient of a gather is several times slower on CPU.
    return hidden_BSH.flatten(0, 1).index_select(0, flat_BT.flatten()).unflatten(0, position_BT.shape)
