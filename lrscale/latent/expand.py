"""Recompute every latent of recorded sequences in order, batched, with gradients through the whole chain.

Round r feeds the r-th stretch of text of every row, up to its next marker, then as many latent steps
as the longest run of the round needs; rows with shorter runs write holes. The last latent of a run makes no other,
so it goes in with the text behind it: a batch takes markers x max N forwards, and one, whatever its size
(method, section 5).

Legend: B rows, T tokens, L latents of a row, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lrscale.latent.layout import PackedRows, Spans, gather_positions
from lrscale.latent.pace import Pace
from lrscale.latent.stream import LatentStream

LatentMode = Literal["real", "zero", "shuffled"]
"""`real`: the method; `zero`: markers are text, no latent steps; `shuffled`: rows swap their latents (a control)."""


def next_latents(projector: nn.Module, hidden_BH: Tensor, active_B: Tensor, mode: LatentMode) -> Tensor:
    """The next latent of every active row, [active, H].

    `shuffled` hands each active row the latent of another active one, half of them away: samples of the same
    prompt stand side by side, so most latents come from other prompts. A row that is active alone gets the
    projection of an idle row's hidden state.

    Raises:
        ValueError: `shuffled` with a single row: there is nothing to swap with.
    """
    rows = active_B.nonzero().squeeze(1)
    if mode == "shuffled":
        batch = active_B.shape[0]
        if batch < 2 and len(rows):
            raise ValueError("shuffled latents need at least 2 rows side by side; 1 given")
        rows = rows.roll(max(1, len(rows) // 2)) if len(rows) > 1 else (rows + batch // 2) % batch
    return projector(hidden_BH[rows])


@dataclass(frozen=True, slots=True)
class Fed:
    """What came out of feeding rows to a stream."""

    hidden: list[Tensor]
    """Pieces [B, K, H] that make up the stream's slots, in order."""
    slot_BT: Tensor
    """[B, T] slot whose logits predict the token after each right-packed one."""
    latents: list[list[Tensor]]
    """The latents of each row, [H] each."""


def expand_rows(
    stream: LatentStream, projector: nn.Module, packed: PackedRows, spans: Sequence[Spans], mode: LatentMode, pace: Pace
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run right-packed rows through the model, latents recomputed.

    Returns:
        hidden_BTH of the right-packed tokens (the last latent's row at each marker's last token), and
        one [L, H] tensor of latents a row.
    """
    fed = feed_rows(stream, projector, packed, spans, mode, pace)
    hidden_BSH = torch.cat(fed.hidden, dim=1)
    empty = hidden_BSH.new_zeros(0, hidden_BSH.shape[-1])
    latents = tuple(torch.stack(row) if row else empty for row in fed.latents)
    return gather_positions(hidden_BSH, fed.slot_BT.to(hidden_BSH.device)), latents


def feed_rows(
    stream: LatentStream, projector: nn.Module, packed: PackedRows, spans: Sequence[Spans], mode: LatentMode, pace: Pace
) -> Fed:
    """Feed whole right-packed rows, text and latents in turns, to a stream.

    Where ranks keep pace, every rank runs the same chain: as many rounds, and in each round as many latent
    steps, as the rank that needs most. What is not a row's own is fed as holes.
    """
    rows, columns = packed.ids_BT.shape
    device = packed.ids_BT.device
    first_slot = stream.slots
    slot_BT = torch.zeros(rows, columns, dtype=torch.long)
    hidden: list[Tensor] = []
    latents: list[list[Tensor]] = [[] for _ in range(rows)]

    rounds = _rounds(packed, spans, pace)
    most = pace.most(*(int(count_B.max()) for _, *counts in rounds for count_B in counts))
    stream.expect(sum(most))
    last_latents = _LastLatents(rows)
    steps_before = 0
    for (start_B, length_B, steps_B), most_text, most_steps in zip(rounds, most[::2], most[1::2], strict=True):
        if most_text or steps_before:
            embeds_BKH, fed_B = _stretch(stream, packed, start_B, length_B, last_latents, slot_BT, first_slot)
            hidden.append(stream.feed(embeds_BKH, fed_B))
        for step in range(most_steps):
            active_B = steps_B > step
            z_AH = next_latents(projector, stream.hidden_BH, active_B.to(device), mode)
            for row, z_H in zip(active_B.nonzero().squeeze(1).tolist(), z_AH.unbind(0), strict=True):
                latents[row].append(z_H)
            last_latents.keep(active_B, z_AH, steps_B == step + 1)
            if step + 1 < most_steps:
                more_B = steps_B > step + 1
                embeds_BH = torch.zeros_like(stream.hidden_BH)
                embeds_BH = embeds_BH.index_put((active_B.to(device),), z_AH)
                hidden.append(stream.feed(embeds_BH[:, None], more_B.long().to(device)))
        steps_before = most_steps
    return Fed(hidden, slot_BT, latents)


def _stretch(  # noqa: PLR0913 - one turn of feed_rows
    stream: LatentStream,
    packed: PackedRows,
    start_B: Tensor,
    length_B: Tensor,
    last_latents: _LastLatents,
    slot_BT: Tensor,
    first_slot: int,
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, K, H] of each row's next stretch of text, behind a latent that waits for it, and their numbers [B].

    Writes into `slot_BT` where they will stand.
    """
    rows, columns = packed.ids_BT.shape
    device, waits_B = packed.ids_BT.device, last_latents.waits_B
    lead_B = waits_B.long()
    width = max(1, int((lead_B + length_B).max()))
    offset_BK = torch.arange(width) - lead_B[:, None]
    column_BK = (start_B[:, None] + offset_BK).clamp(0, columns - 1)
    text_BK = (offset_BK >= 0) & (offset_BK < length_B[:, None])
    slot_BK = (stream.slots - first_slot + torch.arange(width)).expand_as(column_BK)
    row_BK = torch.arange(rows)[:, None].expand_as(column_BK)
    slot_BT[row_BK[text_BK], column_BK[text_BK]] = slot_BK[text_BK]
    slot_BT[waits_B, start_B[waits_B] - 1] = stream.slots - first_slot  # the marker's last token reads its last latent
    embeds_BKH = stream.backbone.embed(packed.ids_BT.gather(1, column_BK.to(device)))
    return last_latents.put_first(embeds_BKH), (lead_B + length_B).to(device)


class _LastLatents:
    """The last latents of runs, which wait for the text behind them."""

    def __init__(self, rows: int) -> None:
        self.waits_B = torch.zeros(rows, dtype=torch.bool)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def keep(self, active_B: Tensor, z_AH: Tensor, last_B: Tensor) -> None:
        """Of the latents just made, those that are the last of their run; last_B is true at active rows alone."""
        self.waits_B = self.waits_B | last_B
        self._kept.append((last_B.nonzero().squeeze(1), z_AH[last_B[active_B].to(z_AH.device)]))

    def put_first(self, embeds_BKH: Tensor) -> Tensor:
        """In column 0 of their rows; none waits any longer.

        Where this rank has none but another has, what comes back still hangs on the projector: the backward pass has to
        run the same forwards again on every rank.
        """
        if not self._kept:
            return embeds_BKH
        rows = torch.cat([rows for rows, _ in self._kept]).to(embeds_BKH.device)
        z_AH = torch.cat([z_AH for _, z_AH in self._kept])
        self.waits_B, self._kept = torch.zeros_like(self.waits_B), []
        return embeds_BKH.index_put((rows, torch.zeros_like(rows)), z_AH)


def _rounds(packed: PackedRows, spans: Sequence[Spans], pace: Pace) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per round: first token, tokens, and latent steps of each row's stretch; 0 where a row has finished."""
    lengths = packed.lengths_B.tolist()
    (rounds,) = pace.most(max(len(row) for row in spans) + 1)
    table = torch.zeros(rounds, 3, len(spans), dtype=torch.long)
    for row, row_spans in enumerate(spans):
        start = 0
        for index, span in enumerate(row_spans):
            table[index, :, row] = torch.tensor([start, span.position + 1 - start, span.steps])
            start = span.position + 1
        table[len(row_spans), :, row] = torch.tensor([start, lengths[row] - start, 0])
    return [(start_B, length_B, steps_B) for start_B, length_B, steps_B in table]
