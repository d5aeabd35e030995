"""An optional second loss of projector SFT: behind a marker the model should be where the words would have put it.

The hidden state of the first token behind each replaced sentence, once with the latents in its place and once with its
words, both behind the same prompt; the second is the target (CODI, arXiv 2502.21074, which compares one such token).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrscale.latent import LatentPolicy, MarkerDetector
from lrscale.stages.batching import padded
from lrscale.stages.lite_rows import LiteRow

Place = tuple[int, int]
"""Index of a token in the row with markers, and of the same token in the row with words."""


def words_again(row: LiteRow, detector: MarkerDetector) -> tuple[tuple[int, ...], list[Place]]:
    """The row's ids with known sentences back in place of their markers, and the tokens that come right behind these.

    A token behind two markers in a row is compared once, behind the second: behind the first comes a marker in the one
    row and words in the other.
    """
    ids: list[int] = []
    places: list[Place] = []
    copied = 0
    for span, words in zip(row.spans, row.replaced, strict=True):
        if not words:
            continue
        start = span.position + 1 - len(detector.marker_ids(span.steps))
        if places and start == copied:
            places.pop()
        ids += [*row.ids[copied:start], *words]
        copied = span.position + 1
        if copied < len(row.ids):
            places.append((copied, len(ids)))
    return (*ids, *row.ids[copied:]), places


def count_places(rows: Sequence[LiteRow], detector: MarkerDetector) -> int:
    """Tokens that `distillation_loss` compares in these rows."""
    return sum(len(words_again(row, detector)[1]) for row in rows)


def distillation_loss(
    policy: LatentPolicy, rows: Sequence[LiteRow], hidden_BTH: Tensor, normaliser: float | Tensor
) -> Tensor:
    """The micro-batch's share of the mean squared distance between the two, in units of the target's own square.

    Args:
        policy: One forward without gradient is run with the words.
        rows: B rows.
        hidden_BTH: Of the rows with their latents, right-padded, with gradient.
        normaliser: Compared tokens of the whole update, over all micro-batches and ranks.
    """
    again = [words_again(row, policy.detector) for row in rows]
    with torch.no_grad():
        target_BTH = policy.expand(*padded([ids for ids, _ in again], policy.device)).hidden_BTH
    places = [(number, *place) for number, (_, found) in enumerate(again) for place in found]
    index_M3 = torch.tensor(places, dtype=torch.long, device=policy.device).reshape(-1, 3)
    rows_M, ours_M, theirs_M = index_M3.unbind(1)
    ours_MH, theirs_MH = hidden_BTH[rows_M, ours_M].float(), target_BTH[rows_M, theirs_M].float()
    square_M = theirs_MH.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((ours_MH - theirs_MH).square().sum(1) / square_M).sum() / normaliser
