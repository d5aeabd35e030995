"""The engine of ZeRO-3: policy and projector partitioned over all ranks by DeepSpeed.

Two DeepSpeed engines on disjoint submodules, one a parameter group. They train by turns, and each keeps its
moments and float32 masters while the other is at work; one engine with an idle group does not (its moments
decay). Modules are called directly, never through `DeepSpeedEngine.forward`, since one update runs the model
many times: what that forward resets is reset in `backward`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_set_local_fp32_param,
)
from torch import Tensor, nn

from lrscale.config.optimisation import OptimisationConfig
from lrscale.latent.hf_layout import PROJECTOR_PREFIX
from lrscale.parallel.engine import GROUPS, NonFiniteError, ParameterGroup
from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.turns import training_turn

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
        self._engines = {group: self._initialise(group, optimisation, ds_config) for group in GROUPS}

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

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """In buckets of GATHER_BYTES. A tensor is whole until the next one is asked for: copy what is to stay."""
        for bucket in _buckets(self._named_parameters(), GATHER_BYTES):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
                for name, parameter in bucket:
                    yield name, parameter.detach()

    def reset_optimizer(self, group: ParameterGroup) -> None:
        """Moments go, and masters start again from the weights as they read now."""
        optimizer = self._engines[group].optimizer
        optimizer.optimizer.state.clear()
        for _, parameter in self._named_parameters(group):
            safe_set_local_fp32_param(parameter, parameter.ds_tensor.float())

    def offload_states(self) -> None:
        if self.device.type != "cpu":
            for engine in self._engines.values():
                engine.offload_states()

    def reload_states(self) -> None:
        if self.device.type != "cpu":
            for engine in self._engines.values():
                engine.reload_states()

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
