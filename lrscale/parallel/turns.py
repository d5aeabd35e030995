"""Whose turn it is: one module of the policy takes gradients, everything else is frozen for the while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

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
