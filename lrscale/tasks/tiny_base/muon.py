"""Muon in float32: torch.optim.Muon orthogonalises in bfloat16, which CPUs without bfloat16 units emulate tenfold slower."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz polynomial of Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon)."""
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's rule (Nesterov momentum, `original` adjustment of the learning rate) for [out, in] matrices.

    Matrices of one shape are orthogonalised together.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; every matrix needs its gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                alike.setdefault(matrix.shape, []).append(matrix)
            for matrices in alike.values():
                self._step_alike(matrices, group["lr"], group["weight_decay"], group["momentum"])

    def _step_alike(self, matrices: Sequence[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        gradients_NOI = torch.stack([matrix.grad for matrix in matrices])
        buffer_NOI = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(gradients_NOI))
        buffer_NOI.lerp_(gradients_NOI, 1.0 - momentum)
        updates_NOI = orthogonalised(gradients_NOI.lerp(buffer_NOI, momentum))
        rows, columns = matrices[0].shape
        scale = max(1.0, rows / columns) ** 0.5
        for matrix, update_OI in zip(matrices, updates_NOI, strict=True):
            matrix.mul_(1.0 - lr * weight_decay).add_(update_OI, alpha=-lr * scale)


def orthogonalised(matrices_NOI: Tensor) -> Tensor:
    """[N, O, I] to matrices with the same singular vectors and singular values near 1."""
    a, b, c = _COEFFICIENTS
    tall = matrices_NOI.shape[1] > matrices_NOI.shape[2]
    x = matrices_NOI.mT if tall else matrices_NOI
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
