"""The engine of ZeRO-3: policy and projector partitioned over all ranks by DeepSpeed.

Two DeepSpeed engines on disjoint submodules, one a parameter group. They train by turns, and each keeps its
moments and float32 masters while the other is at work; one engine with an idle group does not (its moments
decay). Modules are called directly, never through `DeepSpeedEngine.forward`, since one update runs the model
many times: what that forward resets is reset in `backward`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from lrscale.config.optimisation import OptimisationConfig
from lrscale.latent.hf_layout import PROJECTOR_PREFIX
from lrscale.parallel.engine import GROUPS, NonFiniteError, ParameterGroup
from lrscale.parallel.engine_state import load_state, save_state
from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.order import OrderCheck
from lrscale.parallel.parked_states import ParkedStates
from lrscale.parallel.sharded_loading import partition_range
from lrscale.parallel.shards import Piece
from lrscale.parallel.turns import state_buffers, training_turn

if TYPE_CHECKING:
    from lrscale.latent import LatentPolicy

GATHER_BYTES = 256 * 2**20
"""Whole parameters that are gathered side by side: fewer collectives than one by one, and bounded."""
_MOMENTS = ("exp_avg", "exp_avg_sq")

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


class Zero3Engine:
    """See `lrscale.parallel.engine.Engine`.

    Raises:
        ValueError: parameters are whole on this rank: the policy was not loaded for ZeRO-3.
    """

    kind = "zero3"

    def __init__(
        self, policy: LatentPolicy, optimisation: OptimisationConfig, *, lockstep: Lockstep, ds_config: dict[str, Any]
    ) -> None:
        whole = [name for name, parameter in policy.named_parameters() if not hasattr(parameter, "ds_tensor")]
        if whole:
            raise ValueError(
                f"{len(whole)} parameters are not partitioned, {whole[0]} for one: load the policy for ZeRO-3"
            )
        self.policy = policy
        self.lockstep = lockstep
        self.ranks = lockstep.ranks
        self.device: torch.device = policy.device
        policy.pace = lockstep
        self.order: OrderCheck | None = None
        self.gather_bytes = GATHER_BYTES
        self._engines = {group: self._initialise(group, optimisation, ds_config) for group in GROUPS}
        self._parked = {group: ParkedStates(engine.optimizer, self.device) for group, engine in self._engines.items()}

    @contextmanager
    def training(self, group: ParameterGroup) -> Iterator[None]:
        try:
            with training_turn(self.policy, self._module(group)):
                yield
        except BaseException:
            self._engines[group].optimizer.zero_grad()
            raise

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        words = None if bool(torch.isfinite(loss)) else f"loss is {float(loss.detach())}"
        self.refuse(words)
        trained, frozen = sorted(GROUPS, key=self._requires_grad, reverse=True)
        engine = self._engines[trained]
        engine.optimizer.clear_backward_seen_flag()  # what counts the backwards of an update, or they would overwrite
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss * self.ranks.world_size)  # DeepSpeed takes the mean over ranks; the loss's parts add up
        # Modules that were given no gradient to pass on (layer 0 reads tokens) still hold their parameters.
        self._engines[frozen].optimizer.backward_epilogue()

    def refuse(self, words: str | None) -> None:
        self.lockstep.refuse(words and f"{words}; no weight was changed", NonFiniteError)

    def step(self, group: ParameterGroup, *, learning_rate: float, max_grad_norm: float) -> float:
        if self.order is not None:
            self.order.compare(self.lockstep)
        engine = self._engines[group]
        engine.optimizer.clip_grad = max_grad_norm
        for settings in engine.optimizer.param_groups:
            settings["lr"] = learning_rate
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        if engine.optimizer.overflow:
            engine.optimizer.zero_grad()
            raise NonFiniteError(f"{group}: gradient norm is not finite; no weight was changed")
        return float(engine.get_global_grad_norm())

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.lockstep.sum(value)

    def full_parameters(self, only: ParameterGroup | None = None) -> Iterator[tuple[str, Tensor]]:
        """In buckets of `gather_bytes`. A tensor is whole until the next one is asked for: copy what is to stay."""
        for bucket in _buckets(self._named_parameters(only), self.gather_bytes):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
                for name, parameter in bucket:
                    yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        save_state(self, folder)

    def load(self, folder: Path) -> None:
        load_state(self, folder)

    def trained_groups(self) -> list[ParameterGroup]:
        return [group for group, engine in self._engines.items() if engine.optimizer.optimizer.state]

    def weight_names(self) -> list[str]:
        return [name for name, _ in self._named_parameters()] + [name for name, _ in state_buffers(self.policy)]

    def local_state(self) -> Iterator[Piece]:
        for name, buffer in state_buffers(self.policy):
            yield Piece(f"weights/{name}", tuple(buffer.shape), 0, buffer.view(-1), replicated=True)
        trained = self.trained_groups()
        for group in GROUPS:
            step = self._adam_step(group) if group in trained else None
            for name, parameter in self._named_parameters(group):
                shape, (start, stop) = tuple(parameter.ds_shape), partition_range(parameter)
                if step is not None:
                    yield Piece(
                        f"optimizer-{group}/step.{name}", (), 0, step, replicated=True, assign=self._step_setter(group)
                    )
                if stop == start:
                    continue
                yield Piece(f"weights/{name}", shape, start, parameter.ds_tensor.data[: stop - start])
                if step is not None:
                    yield from _optimizer_pieces(f"optimizer-{group}", name, parameter)

    def prepare_states(self, groups: Sequence[ParameterGroup]) -> None:
        for group in GROUPS:
            self.reset_optimizer(group)
            if group in groups:
                optimizer = self._engines[group].optimizer
                for flat in optimizer.fp32_partitioned_groups_flat:
                    zero = {"step": torch.zeros((), dtype=torch.float32, device=flat.device)}
                    optimizer.optimizer.state[flat] = zero | {key: torch.zeros_like(flat.data) for key in _MOMENTS}

    def finish_load(self) -> None:
        """Masters of float32 weights are the weights; what is kept whole on every rank is gathered again."""
        for group, parameter in ((g, p) for g in GROUPS for _, p in self._named_parameters(g)):
            narrow = parameter.dtype != torch.float32
            if not (narrow and group in self.trained_groups()):
                _set_master(parameter, parameter.ds_tensor.data.float())
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.partition(has_been_updated=False)
                if parameter.ds_persist:
                    parameter.all_gather()

    def _adam_step(self, group: ParameterGroup) -> Tensor:
        states = self._engines[group].optimizer.optimizer.state.values()
        return torch.tensor([float(next(iter(states))["step"])])

    def _step_setter(self, group: ParameterGroup) -> Callable[[Tensor], None]:
        def assign(value: Tensor) -> None:
            for state in self._engines[group].optimizer.optimizer.state.values():
                if isinstance(state["step"], Tensor):
                    state["step"].fill_(float(value))
                else:  # DeepSpeed's CPU Adam counts in an integer
                    state["step"] = int(value)

        return assign

    def reset_optimizer(self, group: ParameterGroup) -> None:
        """Moments go, and masters start again from the weights as they read now."""
        optimizer = self._engines[group].optimizer
        optimizer.optimizer.state.clear()
        for _, parameter in self._named_parameters(group):
            _set_master(parameter, parameter.ds_tensor.data.float())

    def offload_states(self) -> None:
        for parked in self._parked.values():
            parked.park()

    def reload_states(self) -> None:
        for parked in self._parked.values():
            parked.fetch()

    def _initialise(self, group: ParameterGroup, optimisation: OptimisationConfig, ds_config: dict[str, Any]) -> Any:
        module = self._module(group)
        module.requires_grad_(True)
        adamw = torch.optim.AdamW(
            module.parameters(),
            lr=0.0,  # given with each step
            betas=optimisation.betas,
            eps=optimisation.eps,
            weight_decay=optimisation.weight_decay,
            fused=True,
        )
        engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=ds_config)
        return engine

    def _requires_grad(self, group: ParameterGroup) -> bool:
        return next(self._module(group).parameters()).requires_grad

    def _module(self, group: ParameterGroup) -> nn.Module:
        return self.policy.model if group == "base" else self.policy.projector

    def _named_parameters(self, only: ParameterGroup | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Tied parameters once, under their first name."""
        for group in GROUPS if only is None else (only,):
            prefix = "" if group == "base" else PROJECTOR_PREFIX
            for name, parameter in self._module(group).named_parameters():
                yield prefix + name, parameter


def attach_inference_hooks(policy: LatentPolicy, ds_config: dict[str, Any]) -> None:
    """Let the modules of a policy that is never trained gather their parameters as they run."""
    for module in (policy.model, policy.projector):
        module.eval()
        deepspeed.initialize(model=module, config=ds_config)


@contextmanager
def _trainable(parameter: nn.Parameter) -> Iterator[None]:
    """DeepSpeed shows the optimizer state of parameters that require gradients only."""
    before = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(before)


def _set_master(parameter: nn.Parameter, values: Tensor) -> None:
    with _trainable(parameter):
        safe_set_local_fp32_param(parameter, values)


def _optimizer_pieces(prefix: str, name: str, parameter: nn.Parameter) -> Iterator[Piece]:
    shape, (start, stop) = tuple(parameter.ds_shape), partition_range(parameter)
    size = parameter.ds_tensor.ds_numel

    def padded(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values.float(), (0, size - values.numel()))

    with _trainable(parameter):
        states = {key: safe_get_local_optimizer_state(parameter, key)[: stop - start] for key in _MOMENTS}
        master = safe_get_local_fp32_param(parameter)[: stop - start]
    for key, values in states.items():

        def assign(values: Tensor, key: str = key) -> None:
            with _trainable(parameter):
                safe_set_local_optimizer_state(parameter, padded(values), key)

        yield Piece(f"{prefix}/{key}.{name}", shape, start, values, assign=assign)
    if parameter.dtype != torch.float32:
        assign_master = lambda values: _set_master(parameter, padded(values))  # noqa: E731
        yield Piece(f"{prefix}/master.{name}", shape, start, master, assign=assign_master)


def _buckets(named: Iterator[tuple[str, nn.Parameter]], limit_bytes: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    bucket: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        needed = parameter.ds_numel * parameter.element_size()
        if bucket and size + needed > limit_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += needed
    if bucket:
        yield bucket
