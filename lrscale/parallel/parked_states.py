"""Room on the accelerator while sequences are decoded: moments and masters wait in CPU memory.

DeepSpeed's own `offload_states` takes no optimizer but its FusedAdam, and would move the weights along, which
decoding on shards reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class ParkedStates:
    """The optimizer states of one DeepSpeed ZeRO-3 engine, moved away and back, bit for bit.

    What lies in CPU memory for good (`parallel.offload_optimizer`) stays there.
    """

    def __init__(self, zero_optimizer: Any, device: torch.device) -> None:
        """`device` is the engine's. On a CPU the states are copied all the same: one way through the code."""
        self._zero = zero_optimizer
        self._device = device
        self._away: list[Tensor] = []

    def park(self) -> None:
        """To CPU memory; nothing where they are there already."""
        if not self._away:
            self._away = [tensor for tensor in self._tensors() if tensor.device == self._device]
            self._move(torch.device("cpu"))

    def fetch(self) -> None:
        """Back to the device."""
        self._move(self._device)
        self._away = []

    def _move(self, place: torch.device) -> None:
        for tensor in self._away:
            tensor.data = tensor.data.to(place, copy=True)

    def _tensors(self) -> Iterator[Tensor]:
        """Masters that are not the weights themselves, then every moment."""
        weights = {flat.data_ptr() for flat in self._zero.fp16_partitioned_groups_flat if flat is not None}
        for master in self._zero.fp32_partitioned_groups_flat:
            if master.data_ptr() not in weights:
                yield master
        for state in self._zero.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
