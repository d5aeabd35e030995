"""The engine of one process on one device: plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrscale.config.optimisation import OptimisationConfig
from lrscale.latent.hf_layout import PROJECTOR_PREFIX
from lrscale.parallel.engine import GROUPS, NonFiniteError, ParameterGroup
from lrscale.parallel.engine_state import load_state, save_state
from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.optimizer import GroupOptimizer
from lrscale.parallel.order import OrderCheck
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.shards import Piece
from lrscale.parallel.turns import training_turn

if TYPE_CHECKING:
    from lrscale.latent import LatentPolicy


class SingleEngine:
    """See `lrscale.parallel.engine.Engine`. Raises ValueError when it is one process of several."""

    kind = "single"

    def __init__(self, policy: LatentPolicy, optimisation: OptimisationConfig, *, ranks: Ranks) -> None:
        if ranks.world_size != 1:
            raise ValueError(
                f"parallel.kind single runs as one process, but WORLD_SIZE is {ranks.world_size}; start one process"
            )
        self.policy = policy
        self.ranks = ranks
        self.lockstep = Lockstep(ranks)
        self.order: OrderCheck | None = None
        self.device: torch.device = next(policy.model.parameters()).device
        self._config = optimisation
        self._optimizers: dict[ParameterGroup, GroupOptimizer] = {}

    @contextmanager
    def training(self, group: ParameterGroup) -> Iterator[None]:
        optimizer = self._optimizer(group)
        try:
            with training_turn(self.policy, self._module(group)):
                yield
        except BaseException:
            optimizer.clear_gradients()  # half an update's gradients must not reach the next one
            raise

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self.refuse(None if bool(torch.isfinite(loss)) else f"loss is {float(loss.detach())}")
        loss.backward()

    def refuse(self, words: str | None) -> None:
        self.lockstep.refuse(words and f"{words}; no weight was changed", NonFiniteError)

    def step(self, group: ParameterGroup, *, learning_rate: float, max_grad_norm: float) -> float:
        try:
            return self._optimizer(group).step(learning_rate=learning_rate, max_grad_norm=max_grad_norm)
        except NonFiniteError as error:
            raise NonFiniteError(f"{group}: {error}") from None

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return value.detach().clone()

    def full_parameters(self, only: ParameterGroup | None = None) -> Iterator[tuple[str, Tensor]]:
        for group in GROUPS if only is None else (only,):
            for name, parameter in self._named_parameters(group):
                yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        save_state(self, folder)

    def load(self, folder: Path) -> None:
        load_state(self, folder)

    def trained_groups(self) -> list[ParameterGroup]:
        return list(self._optimizers)

    def weight_names(self) -> list[str]:
        return list(self._weights())

    def local_state(self) -> Iterator[Piece]:
        for name, tensor in self._weights().items():
            yield Piece(f"weights/{name}", tuple(tensor.shape), 0, tensor.view(-1))
        for group, optimizer in self._optimizers.items():
            for key, name, tensor in optimizer.states():
                yield Piece(f"optimizer-{group}/{key}.{name}", tuple(tensor.shape), 0, tensor.view(-1))

    def prepare_states(self, groups: Sequence[ParameterGroup]) -> None:
        for group in GROUPS:
            self.reset_optimizer(group)
        for group in groups:
            self._optimizer(group).create_states()

    def finish_load(self) -> None:
        """Nothing to do: the pieces are the live tensors."""

    def reset_optimizer(self, group: ParameterGroup) -> None:
        """Moments and master copies go: the next step starts from the weights as they read now."""
        optimizer = self._optimizers.pop(group, None)
        if optimizer is not None:
            optimizer.close()

    def offload_states(self) -> None:
        """Nothing to do: one process decodes and trains on the same weights."""

    def reload_states(self) -> None:
        """Nothing to do: see `offload_states`."""

    def _optimizer(self, group: ParameterGroup) -> GroupOptimizer:
        if group not in self._optimizers:
            self._optimizers[group] = GroupOptimizer(self._named_parameters(group), self._config)
        return self._optimizers[group]

    def _module(self, group: ParameterGroup) -> nn.Module:
        if group not in GROUPS:
            raise ValueError(f"parameter group: given {group!r}, allowed are {GROUPS}")
        return self.policy.model if group == "base" else self.policy.projector

    def _named_parameters(self, group: ParameterGroup) -> Iterator[tuple[str, nn.Parameter]]:
        """Tied parameters once, under their first name."""
        prefix = "" if group == "base" else PROJECTOR_PREFIX
        for name, parameter in self._module(group).named_parameters():
            yield prefix + name, parameter

    def _weights(self) -> dict[str, Tensor]:
        """Parameters once each, and the buffers that belong to the state; the live tensors, not copies."""
        tensors: dict[str, Tensor] = {}
        for group in GROUPS:
            module, prefix = self._module(group), "" if group == "base" else PROJECTOR_PREFIX
            tensors.update((name, parameter.detach()) for name, parameter in self._named_parameters(group))
            every_name = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            state = module.state_dict()
            tensors.update((prefix + name, value) for name, value in state.items() if name not in every_name)
        return tensors
