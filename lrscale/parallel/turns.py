"""Whose turn it is: one module of the policy takes gradients, everything else is frozen for the while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lrscale.latent.hf_layout import PROJECTOR_PREFIX

if TYPE_CHECKING:
    from lrscale.latent import LatentPolicy


@contextmanager
def training_turn(policy: LatentPolicy, trained: nn.Module) -> Iterator[None]:
    """Within it only the parameters of `trained` require gradients, and only it is in train() mode."""
    chosen = {id(parameter) for parameter in trained.parameters()}
    required = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    modes = [(module, module.training) for module in policy.modules()]
    for parameter, _ in required:
        parameter.requires_grad_(id(parameter) in chosen)
    policy.eval()
    trained.train()
    try:
        yield
    finally:
        for parameter, before in required:
            parameter.requires_grad_(before)
        for module, before in modes:
            module.training = before


def state_buffers(policy: LatentPolicy) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to a checkpoint, under their names in it. They are the same on every rank."""
    for module, prefix in ((policy.model, ""), (policy.projector, PROJECTOR_PREFIX)):
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        kept = set(module.state_dict(keep_vars=True)) - parameters
        yield from ((prefix + name, buffer) for name, buffer in module.named_buffers() if name in kept)
