"""The engine of FSDP2: policy and projector sharded over all ranks by torch's `fully_shard`.

Every module that stages call on their own (embedding, each block, final norm, LM head, each projector block) is
a unit of its own: expand and decoding call them outside of any one model forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lrscale.config.optimisation import OptimisationConfig
from lrscale.latent.hf_layout import PROJECTOR_PREFIX
from lrscale.parallel.engine import GROUPS, NonFiniteError, ParameterGroup
from lrscale.parallel.engine_state import load_state, save_state
from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.optimizer import GroupOptimizer
from lrscale.parallel.order import OrderCheck
from lrscale.parallel.shards import Piece
from lrscale.parallel.turns import state_buffers, training_turn

if TYPE_CHECKING:
    from lrscale.latent import LatentPolicy


class Fsdp2Engine:
    """See `lrscale.parallel.engine.Engine`. The policy comes sharded (`shard_policy`)."""

    kind = "fsdp2"

    def __init__(self, policy: LatentPolicy, optimisation: OptimisationConfig, *, lockstep: Lockstep) -> None:
        whole = [name for name, parameter in policy.named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            raise ValueError(f"{len(whole)} parameters are not sharded, {whole[0]} for one: load the policy for FSDP2")
        self.policy = policy
        self.lockstep = lockstep
        self.ranks = lockstep.ranks
        self.device: torch.device = policy.device
        policy.pace = lockstep
        self.order: OrderCheck | None = None
        self._config = optimisation
        self._optimizers: dict[ParameterGroup, GroupOptimizer] = {}
        self._turn: ParameterGroup | None = None

    @contextmanager
    def training(self, group: ParameterGroup) -> Iterator[None]:
        optimizer = self._optimizer(group)
        self._take_turn(group)
        try:
            with training_turn(self.policy, self._module(group)):
                yield
        except BaseException:
            optimizer.clear_gradients()
            raise

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self.refuse(None if bool(torch.isfinite(loss)) else f"loss is {float(loss.detach())}")
        (loss * self.ranks.world_size).backward()  # FSDP takes the mean over ranks; the loss's parts add up
        for optimizer in self._optimizers.values():
            optimizer.collect_gradients()

    def refuse(self, words: str | None) -> None:
        self.lockstep.refuse(words and f"{words}; no weight was changed", NonFiniteError)

    def step(self, group: ParameterGroup, *, learning_rate: float, max_grad_norm: float) -> float:
        if self.order is not None:
            self.order.compare(self.lockstep)
        try:
            return self._optimizer(group).step(learning_rate=learning_rate, max_grad_norm=max_grad_norm)
        except NonFiniteError as error:
            raise NonFiniteError(f"{group}: {error}") from None

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.lockstep.sum(value)

    def full_parameters(self, only: ParameterGroup | None = None) -> Iterator[tuple[str, Tensor]]:
        """One by one; each is whole until the next is asked for."""
        for name, parameter in self._named_parameters(only):
            yield name, parameter.detach().full_tensor()

    def save(self, folder: Path) -> None:
        save_state(self, folder)

    def load(self, folder: Path) -> None:
        load_state(self, folder)

    def trained_groups(self) -> list[ParameterGroup]:
        return list(self._optimizers)

    def weight_names(self) -> list[str]:
        return [name for name, _ in self._named_parameters()] + [name for name, _ in state_buffers(self.policy)]

    def local_state(self) -> Iterator[Piece]:
        for name, parameter in self._named_parameters():
            yield from _local_piece(f"weights/{name}", parameter.detach())
        for name, buffer in state_buffers(self.policy):
            yield Piece(f"weights/{name}", tuple(buffer.shape), 0, buffer.view(-1), replicated=True)
        for group, optimizer in self._optimizers.items():
            for key, name, tensor in optimizer.states():
                yield from _local_piece(f"optimizer-{group}/{key}.{name}", tensor)

    def prepare_states(self, groups: Sequence[ParameterGroup]) -> None:
        for group in GROUPS:
            self.reset_optimizer(group)
        for group in groups:
            self._optimizer(group).create_states()

    def finish_load(self) -> None:
        """Nothing to do: the pieces are the live shards."""

    def reset_optimizer(self, group: ParameterGroup) -> None:
        optimizer = self._optimizers.pop(group, None)
        if optimizer is not None:
            optimizer.close()

    def offload_states(self) -> None:
        """Nothing to do: moments and masters stay where they are."""

    def reload_states(self) -> None:
        """Nothing to do: see `offload_states`."""

    def _take_turn(self, group: ParameterGroup) -> None:
        """Freeze the other group also where FSDP keeps its gathered parameters, which it makes but once."""
        if self._turn == group:
            return
        for other in GROUPS:
            for module in self._module(other).modules():
                if isinstance(module, FSDPModule):
                    module.unshard()
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(other == group)
                    for child in module.modules():
                        for parameter in child.parameters(recurse=False):
                            parameter.requires_grad_(other == group)
                    module.reshard()
        self._turn = group

    def _optimizer(self, group: ParameterGroup) -> GroupOptimizer:
        if group not in self._optimizers:
            self._optimizers[group] = GroupOptimizer(self._named_parameters(group), self._config)
        return self._optimizers[group]

    def _module(self, group: ParameterGroup) -> nn.Module:
        return self.policy.model if group == "base" else self.policy.projector

    def _named_parameters(self, only: ParameterGroup | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Tied parameters once, under their first name."""
        for group in GROUPS if only is None else (only,):
            prefix = "" if group == "base" else PROJECTOR_PREFIX
            for name, parameter in self._module(group).named_parameters():
                yield prefix + name, parameter


def shard_policy(policy: LatentPolicy, *, device_type: str) -> None:
    """Shard every unit of the policy over all ranks, in place.

    Gradients are reduced in float32: summing hundreds of ranks in bfloat16 loses the small ones.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    model = policy.model
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        model.set_output_embeddings(TiedHead(model.get_input_embeddings()))
    for unit in units(policy):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    if isinstance(model.get_output_embeddings(), TiedHead):
        register_fsdp_forward_method(model.get_input_embeddings(), "attend")


class TiedHead(nn.Module):
    """An LM head that reads the embedding's weight by way of the embedding, which alone gathers it.

    FSDP2 keeps a parameter in one module; a head with the same one would go on with a stale, whole copy.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.out_features = embedding.num_embeddings
        self._embedding = [embedding]  # in a list: a child module would count its parameter twice
        embedding.attend = MethodType(_attend, embedding)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._embedding[0].attend(hidden)


def _attend(embedding: nn.Module, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, embedding.weight)


def units(policy: LatentPolicy) -> Iterator[nn.Module]:
    """What is gathered together."""
    embedding, head = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
    yield embedding
    if not isinstance(head, TiedHead):
        yield head
    for child in policy.model.base_model.children():
        for unit in child if isinstance(child, nn.ModuleList) else [child]:
            if unit is not embedding and any(True for _ in unit.parameters()):
                yield unit
    yield from policy.projector
    if policy.projector.gain is not None:
        yield policy.projector


def _local_piece(name: str, tensor: Tensor) -> Iterator[Piece]:
    """This rank's rows, if it has any; what is no DTensor (Adam's step) is the same everywhere."""
    if not isinstance(tensor, DTensor):
        yield Piece(name, tuple(tensor.shape), 0, tensor.view(-1), replicated=True)
        return
    start, stop = local_range(tensor)
    if stop > start:
        yield Piece(name, tuple(tensor.shape), start, tensor.to_local().view(-1))


def local_range(parameter: DTensor) -> tuple[int, int]:
    """[start, stop) of the flattened tensor that this rank holds: FSDP2 shards rows of dimension 0."""
    mesh: DeviceMesh = parameter.device_mesh
    rows, width = parameter.shape[0], parameter.numel() // max(parameter.shape[0], 1)
    chunk = -(-rows // mesh.size())
    start = min(chunk * mesh.get_local_rank(), rows)
    return start * width, min(start + chunk, rows) * width
