"""Debugging: do all ranks call the same modules in the same order, forwards and backwards?

Where parameters are sharded, ranks that call different modules of equal size exchange the wrong weights, and
nothing complains. `parallel.check_order` records every call and compares all ranks' records now and then.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lrscale.parallel.lockstep import Lockstep

KEPT = 4096
"""Calls that are remembered by name, to say where ranks parted."""


class OrderError(RuntimeError):
    """Ranks called modules in different orders: whatever was computed since is wrong."""


class OrderCheck:
    """Records the calls of every module that holds parameters of its own."""

    def __init__(self, module: nn.Module) -> None:
        self._digest = hashlib.sha256()
        self._count = 0
        self._names: deque[str] = deque(maxlen=KEPT)
        self._handles: list[RemovableHandle] = []
        for name, part in module.named_modules():
            if any(True for _ in part.parameters(recurse=False)):
                self._handles.append(part.register_forward_hook(self._forward_hook(name)))

    def compare(self, lockstep: Lockstep) -> None:
        """Raise OrderError on every rank where the records differ. Collective; begins new records."""
        records = lockstep.gather_json([self._digest.hexdigest(), self._count])
        if any(record != records[0] for record in records):
            raise OrderError(_difference(lockstep.gather_json(list(self._names)), [count for _, count in records]))
        self._digest, self._count = hashlib.sha256(), 0
        self._names.clear()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, call: str) -> None:
        self._digest.update(call.encode() + b"\n")
        self._count += 1
        self._names.append(call)

    def _forward_hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._record(f"forward {name}")
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: self._record(f"backward {name}"))

        return hook


def _difference(names: list[list[str]], counts: list[int]) -> str:
    """The first call in which two ranks differ, as far as it is remembered."""
    for other in range(1, len(names)):
        if counts[0] <= KEPT and counts[other] <= KEPT:
            for number, (ours, theirs) in enumerate(zip(names[0], names[other], strict=False)):
                if ours != theirs:
                    return (
                        f"call {number + 1}: rank 0 ran {ours}, rank {other} {theirs}; what was computed since is wrong"
                    )
        if counts[0] != counts[other]:
            return f"rank 0 made {counts[0]} module calls, rank {other} {counts[other]}; they did not run in lockstep"
    return f"ranks called modules in different orders, more than {KEPT} calls ago"
