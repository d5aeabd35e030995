"""Rows behind prefixes that they share: samples of one prompt pay for it once.

The prefixes go through the model side by side; what their positions leave in the cache is then seen by every row
behind them, with gradients through it.
"""

from __future__ import annotations

import torch

from lrscale.latent.backbone import Backbone
from lrscale.latent.layout import PackedRows, Spans, pad_rows
from lrscale.latent.marker import MarkerDetector
from lrscale.latent.stream import LatentStream
from lrscale.records import LatentSpan, SharedPrefix


def stream_behind(backbone: Backbone, prefix: SharedPrefix, *, in_pieces: bool) -> LatentStream:
    """A stream that has fed the prefixes: a row of it stands behind its own. `in_pieces` where one feed follows."""
    packed = pad_rows(prefix.ids, backbone.device)
    stream = LatentStream(backbone, len(prefix.ids), in_pieces=in_pieces)
    stream.feed(backbone.embed(packed.ids_BT), packed.lengths_B)
    stream.keep(torch.tensor(prefix.of_row_B, device=backbone.device))
    return stream


def spans_behind(detector: MarkerDetector, prefix: SharedPrefix, packed: PackedRows) -> list[Spans]:
    """The latent runs of each row; positions count the row's own tokens. A marker may begin in the prefix.

    Raises:
        ValueError: as many rows as the prefix knows are needed, and no marker that ends within it.
    """
    rows = [row[:length] for row, length in zip(packed.ids_BT.tolist(), packed.lengths_B.tolist(), strict=True)]
    if len(rows) != len(prefix.of_row_B):
        raise ValueError(f"prefix: it is for {len(prefix.of_row_B)} rows, {len(rows)} given")
    found = []
    for number, (row, group) in enumerate(zip(rows, prefix.of_row_B, strict=True)):
        before = len(prefix.ids[group])
        spans = detector.find([*prefix.ids[group], *row])
        if spans and spans[0].position < before:
            raise ValueError(
                f"row {number}: a marker ends at token {spans[0].position} of its prefix, which is {before} tokens long; "
                "cut the prefix in front of it"
            )
        found.append(tuple(LatentSpan(span.position - before, span.steps) for span in spans))
    return found
