"""What is kept for each block of the KV cache, so that a sequence can go on from any block it is found in.

A block's entry tells of the last position that was computed in it: the packed state of the marker automaton
behind that position and, where a latent step follows, its latent. It lives and dies with the block: prefix
caching, preemption and chunked prefill need no more bookkeeping. One vector of width H a block.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SideBuffers:
    """Entries of `blocks` KV blocks and a spare one, which takes what padding rows write."""

    def __init__(self, blocks: int, block_size: int, hidden_size: int, like: Tensor) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.latent = like.new_zeros(blocks + 1, hidden_size)
        self.state = torch.zeros(blocks + 1, dtype=torch.long, device=like.device)
        self.finishing_row = torch.full((blocks + 1,), -1, dtype=torch.long, device=like.device)
        """Scratch within a step: the row that computes a block's last position; -1 everywhere between steps."""

    @property
    def spare(self) -> int:
        return self.blocks

    def blocks_of(self, slots_N: Tensor) -> Tensor:
        """The block of each slot; the spare one for padding, whose slot is -1."""
        return torch.where(slots_N < 0, self.spare, slots_N // self.block_size).long()
