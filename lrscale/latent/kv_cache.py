"""Two key-value caches with one interface: in place for inference, in pieces for gradients.

transformers' DynamicCache concatenates at every step, which copies the whole
cache for each latent step or token; its StaticCache attends over its full length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """Writes new keys and values into spare room; no gradients.

    Buffers are [B, heads, capacity, head_dim]; capacity grows by half when it is used up,
    so that n steps copy O(n) positions in all instead of O(n^2).
    """

    MIN_SPARE = 64

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.expected = 0
        """Positions that will be needed in all, where that is known: then it grows once."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = 0 if self._buffers is None else self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        if self._buffers is None or stop > self._buffers[0].shape[-2]:
            self._buffers = (self._grown(self.keys, key_states, stop), self._grown(self.values, value_states, stop))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:stop, :] = new
        self.keys, self.values = (buffer[..., :stop, :] for buffer in self._buffers)
        return self.keys, self.values

    def _grown(self, old: Tensor, new: Tensor, needed: int) -> Tensor:
        wanted = self.expected if needed <= self.expected else needed * 3 // 2
        capacity = max(needed + self.MIN_SPARE, wanted)
        buffer = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
        if self._buffers is not None:
            buffer[..., : old.shape[-2], :] = old
        return buffer

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (rows may repeat: a prompt prefilled once serves its whole group)."""
        length = self.keys.shape[-2]
        self._buffers = tuple(self._selected(b, indices, length) for b in self._buffers)
        self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)

    def _selected(self, buffer: Tensor, indices: Tensor, length: int) -> Tensor:
        kept = buffer.new_empty(indices.shape[0], *buffer.shape[1:])
        torch.index_select(buffer[..., :length, :], 0, indices, out=kept[..., :length, :])
        return kept


class Piece(NamedTuple):
    """What one forward added to a layer's cache: [rows, heads, K, head_dim] each."""

    keys: Tensor
    values: Tensor
    taken_B: Tensor | None = None
    """Which of its rows each row of the batch sees; None where they are the batch's own, in order."""

    def taken(self, rows: Tensor) -> Piece:
        """The same for a batch of these rows of the present one."""
        return self._replace(taken_B=rows if self.taken_B is None else self.taken_B[rows])

    def of_rows(self, part: Tensor) -> Tensor:
        """Keys or values, a row of the batch each."""
        return part if self.taken_B is None else part.index_select(0, self.taken_B)


class PieceLayer(DynamicLayer):
    """Keeps each chunk's keys and values as a tensor of its own, so that gradients flow through all of them.

    `pieces` are earlier chunks. Nothing is written in place and no concatenation is kept, so a layer under activation
    checkpointing may run twice.
    """

    def __init__(self, pieces: Sequence[Piece] = ()) -> None:
        super().__init__()
        self.pieces = tuple(pieces)
        self._fresh: Piece | None = None
        self._taken = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._taken:  # what a recomputation gives is used for this layer alone
            self._fresh = Piece(key_states, value_states)
        keys = torch.cat([*(piece.of_rows(piece.keys) for piece in self.pieces), key_states], dim=-2)
        values = torch.cat([*(piece.of_rows(piece.values) for piece in self.pieces), value_states], dim=-2)
        return keys, values

    def take(self) -> Piece:
        """What the forward added, once. A checkpoint holds the layer, so the layer must not go on holding its result."""
        fresh, self._fresh, self._taken = self._fresh, None, True
        return fresh

    def get_seq_length(self) -> int:
        return sum(piece.keys.shape[-2] for piece in self.pieces)


def cache_of(layer: Callable[[], DynamicLayer], layers: int) -> Cache:
    """A transformers cache made of `layers` layers of one kind."""
    return Cache(layers=[layer() for _ in range(layers)])
