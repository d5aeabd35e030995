"""What vLLM computes in one forward, as its forward context tells.

Legend: N rows of the input, padding included; T of them real positions, of R sequences, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from lrscale.rollout.vllm.compatibility import check_metadata


@dataclass(frozen=True, slots=True)
class Step:
    """One forward over T positions of R sequences."""

    positions_N: Tensor
    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    """Where in the KV cache a position is written; -1 for padding."""
    starts_R1: Tensor
    """[R + 1] first row of each sequence, and T."""
    block_table_RK: Tensor
    """KV blocks of each sequence."""
    single: bool
    """Every sequence computes one position: a step of decoding, as a rule."""
    captured: bool
    """The forward is recorded in a CUDA graph as a whole: it must not depend on values."""

    @classmethod
    def current(cls, input_ids: Tensor, positions: Tensor) -> Step | None:
        """None in vLLM's profiling run, which has no KV cache."""
        context = get_forward_context()
        metadata: Any = context.attn_metadata
        if isinstance(metadata, dict):
            metadata = next(iter(metadata.values()), None)
        if metadata is None:
            return None
        check_metadata(metadata)
        rows = int(metadata.num_actual_tokens)
        return cls(
            positions_N=positions,
            ids_T=input_ids[:rows].long(),
            positions_T=positions[:rows],
            slots_T=metadata.slot_mapping[:rows].long(),
            starts_R1=metadata.query_start_loc.long(),
            block_table_RK=metadata.block_table,
            single=metadata.max_query_len == 1,
            captured=context.cudagraph_runtime_mode == CUDAGraphMode.FULL,
        )

    @property
    def sequences(self) -> int:
        return self.starts_R1.shape[0] - 1

    def blocks_before(self, positions_R: Tensor, block_size: int) -> Tensor:
        """[R] the KV block of the position before each given one; any block where there is none."""
        index_R1 = ((positions_R - 1).clamp(min=0) // block_size)[:, None]
        return self.block_table_RK[: positions_R.shape[0]].gather(1, index_R1.long()).squeeze(1).long()
