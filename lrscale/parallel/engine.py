"""What stages ask of the trainer, whichever way it is sharded.

A stage trains one parameter group at a time, in turns: `projector` in stage 2 and every refresh,
`base` in RL. Both groups keep their optimizer state from turn to turn.

    with engine.training("base"):
        for micro_batch in micro_batches:           # as many on every rank
            engine.backward(loss(micro_batch), last=...)   # normalised over the whole update: they add up
        grad_norm = engine.step("base", learning_rate=..., max_grad_norm=...)

With several ranks every method but `backward`'s own arithmetic is collective: all ranks call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.order import OrderCheck
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.shards import Piece

if TYPE_CHECKING:
    from lrscale.latent import LatentPolicy

ParameterGroup = Literal["base", "projector"]
GROUPS: tuple[ParameterGroup, ...] = ("base", "projector")


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite on some rank. Raised on all, before any weight of the update has moved."""


class Engine(Protocol):
    """A policy that can be trained."""

    policy: LatentPolicy
    ranks: Ranks
    lockstep: Lockstep
    device: torch.device
    order: OrderCheck | None
    """Debugging (`parallel.check_order`): compared over ranks before every optimizer step."""

    def training(self, group: ParameterGroup) -> AbstractContextManager[None]:
        """Within it only this group takes gradients and is in train() mode; restored afterwards."""
        ...

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Adds the loss's gradients to those of the update: over micro-batches and over ranks. `last` marks the
        update's last micro-batch. Raises NonFiniteError, on all ranks, for a loss that is not finite on any.
        """
        ...

    def refuse(self, words: str | None) -> None:
        """Raises NonFiniteError on all ranks where any rank has `words` about something that is not finite."""
        ...

    def step(self, group: ParameterGroup, *, learning_rate: float, max_grad_norm: float) -> float:
        """Clips, steps, clears the gradients; returns the gradient norm before clipping.

        Raises NonFiniteError before any weight moves where the norm is not finite.
        """
        ...

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The same tensor summed over all ranks, detached."""
        ...

    def full_parameters(self, only: ParameterGroup | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters, one by one, under their names in a checkpoint of the Hugging Face layout; of one group
        alone where it is named."""
        ...

    def local_state(self) -> Iterator[Piece]:
        """What `save` writes on this rank: weights and optimizer state."""
        ...

    def save(self, folder: Path) -> None:
        """Weights and optimizer states, exactly, into an existing folder that all ranks see."""
        ...

    def load(self, folder: Path) -> None:
        """Restores what any kind of engine saved, on any number of ranks; bit for bit on as many of the same kind.

        Groups without saved optimizer state start afresh.
        """
        ...

    def reset_optimizer(self, group: ParameterGroup) -> None:
        """Forgets the group's optimizer state; the weights stay."""
        ...

    def offload_states(self) -> None:
        """Makes room on the accelerator while sequences are decoded."""
        ...

    def reload_states(self) -> None:
        """Undoes `offload_states`."""
        ...
