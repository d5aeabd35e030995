"""Feeding text and latents to the model in turns, behind one KV cache: what expand and generate share.

Legend: B rows, K positions fed now, S cache slots, H hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lrscale.latent.backbone import AttentionMask, Backbone
from lrscale.latent.kv_cache import GrowingLayer, Piece, PieceLayer, cache_of


class LatentStream:
    """Rows that advance side by side, each at its own position.

    All rows write the same cache slots; where a row has nothing to feed it writes a hole,
    which no query ever sees. `hidden_BH` is the hidden state at each row's latest real position.

    With gradients the cache is kept in pieces, one a feed, which are put together for the layer at work. Without, it
    is one buffer that grows, unless `in_pieces` is asked for: few feeds, whose rows share what is in front of them.
    """

    def __init__(self, backbone: Backbone, rows: int, *, in_pieces: bool = False) -> None:
        self.backbone = backbone
        self._in_pieces = in_pieces or torch.is_grad_enabled()
        self._cache = cache_of(GrowingLayer, backbone.layers)
        self._pieces: list[list[Piece]] = [[] for _ in range(backbone.layers)]
        device = backbone.device
        self._key_position_BS = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self._key_valid_BS = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.position_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.hidden_BH = torch.zeros(rows, backbone.hidden_size, dtype=backbone.dtype, device=device)

    @property
    def slots(self) -> int:
        """Cache slots used so far, holes included."""
        return self._key_valid_BS.shape[1]

    def expect(self, more: int) -> None:
        """Say how many slots will be fed from here on, so that the cache is not copied each time that it grows."""
        for layer in self._cache.layers:
            layer.expected = self.slots + more

    def feed(self, embeds_BKH: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Append the first `lengths_B` of K positions of every row (all K where None).

        Returns:
            [B, K, H] hidden states after the final norm; meaningless behind a row's length.
        """
        rows, fed = embeds_BKH.shape[:2]
        offset_K = torch.arange(fed, device=embeds_BKH.device)
        if lengths_B is None:
            valid_BK = torch.ones(rows, fed, dtype=torch.bool, device=embeds_BKH.device)
            lengths_B = torch.full_like(self.position_B, fed)
        else:
            valid_BK = offset_K < lengths_B[:, None]
        first = self.slots == 0
        # A hole stands at the row's last real position, so that every query sees at least one key.
        last_B = (self.position_B + lengths_B - 1).clamp(min=0)
        position_BK = torch.minimum(self.position_B[:, None] + offset_K, last_B[:, None])
        self._key_position_BS = torch.cat([self._key_position_BS, position_BK], dim=1)
        self._key_valid_BS = torch.cat([self._key_valid_BS, valid_BK], dim=1)
        # What comes first is plain causal text, its holes behind it: the fused causal kernels need no mask.
        mask = None if first else self.backbone.attention_mask(position_BK, self._key_position_BS, self._key_valid_BS)
        hidden_BKH = self._forward(embeds_BKH, mask, position_BK)
        newest_BH = hidden_BKH[torch.arange(rows, device=hidden_BKH.device), (lengths_B - 1).clamp(min=0)]
        self.hidden_BH = torch.where((lengths_B > 0)[:, None], newest_BH, self.hidden_BH)
        self.position_B = self.position_B + lengths_B
        return hidden_BKH

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order; a row may be taken several times."""
        if self._in_pieces:
            self._pieces = [[piece.taken(rows) for piece in pieces] for pieces in self._pieces]
        else:
            self._cache.batch_select_indices(rows)
        self._key_position_BS = self._key_position_BS[rows]
        self._key_valid_BS = self._key_valid_BS[rows]
        self.position_B = self.position_B[rows]
        self.hidden_BH = self.hidden_BH[rows]

    def _forward(self, embeds_BKH: Tensor, mask: AttentionMask | None, position_BK: Tensor) -> Tensor:
        if not self._in_pieces:
            return self.backbone.forward_cached(embeds_BKH, mask, position_BK, self._cache)
        layers = [PieceLayer(pieces) for pieces in self._pieces]
        hidden_BKH = self.backbone.forward_cached(embeds_BKH, mask, position_BK, Cache(layers=layers))
        for pieces, layer in zip(self._pieces, layers, strict=True):
            pieces.append(layer.take())
        return hidden_BKH
