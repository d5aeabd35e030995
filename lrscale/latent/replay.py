"""Put recorded latents back in as constant input embeddings: one forward, no data-dependent control flow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrscale.latent.backbone import Backbone
from lrscale.latent.layout import PackedRows, Placement, Spans, gather_positions, place
from lrscale.latent.stream import LatentStream
from lrscale.records import LatentSpan


def fit_spans(spans: Sequence[Spans], lengths_B: Tensor, latents: Sequence[Tensor]) -> list[Spans]:
    """Shorten the last run of rows that a length limit cut in mid-run.

    Raises:
        ValueError: the number of latents of a row fits neither its markers nor such a cut.
    """
    if len(spans) != len(latents):
        raise ValueError(f"{len(latents)} rows of latents given for {len(spans)} rows of tokens")
    fitted = []
    for row, (row_spans, length) in enumerate(zip(spans, lengths_B.tolist(), strict=True)):
        wanted, given = sum(span.steps for span in row_spans), latents[row].shape[0]
        if given < wanted and row_spans[-1].position == length - 1:
            last = row_spans[-1]
            row_spans = (*row_spans[:-1], LatentSpan(last.position, last.steps - (wanted - given)))
        if given != sum(span.steps for span in row_spans) or (row_spans and row_spans[-1].steps < 0):
            raise ValueError(
                f"row {row}: {given} latents given, its markers ask for {wanted}; "
                "hand in the latents that were recorded with this sequence (mode='zero' ignores markers)"
            )
        fitted.append(row_spans)
    return fitted


def replay_rows(
    backbone: Backbone,
    packed: PackedRows,
    spans: Sequence[Spans],
    latents: Sequence[Tensor],
    behind: LatentStream | None = None,
) -> Tensor:
    """Hidden states [B, T, H] of right-packed tokens, with `latents` standing where they were recorded.

    Behind a stream the rows go on where it stands, and through its cache; otherwise nothing is cached.
    """
    hidden_BSH, placement = _replay_positions(backbone, packed, spans, latents, behind)
    return gather_positions(hidden_BSH, placement.read_BT.clamp(max=hidden_BSH.shape[1] - 1))


def projector_inputs(
    backbone: Backbone, packed: PackedRows, spans: Sequence[Spans], latents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """[L, H] a row: the hidden state that each latent would be projected from, in the order of the latents."""
    hidden_BSH, placement = _replay_positions(backbone, packed, spans, latents)
    before_latent_BS = placement.is_latent_BS[:, 1:]  # a latent is projected from the position before its own
    inputs_LH = hidden_BSH[:, :-1][before_latent_BS]
    return inputs_LH.split([sum(span.steps for span in row) for row in spans])


def _replay_positions(
    backbone: Backbone,
    packed: PackedRows,
    spans: Sequence[Spans],
    latents: Sequence[Tensor],
    behind: LatentStream | None = None,
) -> tuple[Tensor, Placement]:
    """Hidden states [B, S, H] of all positions, and what stands where."""
    placement = place(spans, packed.lengths_B, packed.ids_BT.shape[1])
    positions = placement.is_latent_BS.shape[1]
    ids_BS = torch.zeros(len(spans), positions, dtype=torch.long, device=backbone.device)
    real_BT = torch.arange(packed.ids_BT.shape[1], device=backbone.device) < packed.lengths_B[:, None]
    row_BT = torch.arange(len(spans), device=backbone.device)[:, None].expand_as(real_BT)
    ids_BS[row_BT[real_BT], placement.token_BT[real_BT]] = packed.ids_BT[real_BT]
    embeds_BSH = backbone.embed(ids_BS)
    if any(len(row) for row in latents):
        recorded_LH = torch.cat([row.to(embeds_BSH) for row in latents if len(row)])
        embeds_BSH = embeds_BSH.index_put((placement.is_latent_BS,), recorded_LH)
    if behind is None:
        return backbone.forward_causal(embeds_BSH), placement
    steps_B = torch.tensor([sum(span.steps for span in row) for row in spans], device=backbone.device)
    return behind.feed(embeds_BSH, packed.lengths_B + steps_B), placement
