"""The marker automaton over vLLM's tokens, where one reserved id stands for a latent position.

A packed state is one int64: the detector's state in the lower 16 bits, the latent steps still to come above.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lrscale.latent import MarkerDetector

Packed = TypeVar("Packed", int, Tensor)

_STATE_BITS = 16
_STATE_MASK = (1 << _STATE_BITS) - 1


class PositionAutomaton:
    """`MarkerDetector` with latent positions in its stream; the detector alone knows what a marker is."""

    def __init__(self, detector: MarkerDetector, latent_token_id: int) -> None:
        self.detector = detector
        self.latent_token_id = latent_token_id

    def place_on(self, device: torch.device) -> None:
        """Copy the tables there, so that a later `advance` allocates nothing that outlives it."""
        one = torch.zeros(1, dtype=torch.long, device=device)
        self.advance(one, one)

    def advance(self, packed_N: Tensor, ids_N: Tensor) -> Tensor:
        """The packed states after one more position each; fixed shapes, no data-dependent control flow."""
        states_N, remaining_N = self.detector.follow(
            packed_N & _STATE_MASK, packed_N >> _STATE_BITS, ids_N.long(), ids_N == self.latent_token_id
        )
        return states_N | remaining_N << _STATE_BITS

    def along(self, packed: int, ids_N: np.ndarray) -> np.ndarray:
        """The packed state after each position of one stretch of ids, [N] int64.

        Token by token only where a marker or a run is under way; all else is skipped at once.
        """
        packed_N = np.zeros(len(ids_N), dtype=np.int64)
        starts = np.flatnonzero(self.detector.may_begin(ids_N)).tolist()
        ids = ids_N.tolist()
        end = 0
        for start in [0, *starts] if packed else starts:
            if start < end:
                continue
            end = start
            while end < len(ids) and (packed or end == start):
                packed = self._advance_one(packed, ids[end])
                packed_N[end] = packed
                end += 1
        return packed_N

    def _advance_one(self, packed: int, token_id: int) -> int:
        remaining = packed >> _STATE_BITS
        if token_id == self.latent_token_id:
            return packed & _STATE_MASK | max(remaining - 1, 0) << _STATE_BITS
        state, remaining = self.detector.advance_one(packed & _STATE_MASK, token_id)
        return state | remaining << _STATE_BITS


def steps_to_come(packed: Packed) -> Packed:
    """Latent steps that follow a position in this packed state, or positions in these."""
    return packed >> _STATE_BITS
