"""The Reasoning Projector: hidden state in, input embedding of the next latent position out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

ProjectorKind = Literal["paper", "normalised", "residual"]

_EPS = 1e-6


class ReasoningProjector(nn.ModuleList):
    """Stacked copies of the base model's last-block MLP (LiteReason, arXiv 2512.02240, section 3).

    [..., H] final-norm hidden states to [..., H] input embeddings.

    `paper`: the blocks one after the other, no residual, no norm. Three gated blocks are a map of
    degree 8 and may leave the scale of embeddings by orders of magnitude: measure it.
    `normalised`: RMS norm before each block and at the end, times a learned gain a dimension.
    `residual`: the same with what a block reads added to what it gives, as in the base model's own layers.

    Tensor names are the public reference's, `{i}.gate_proj.weight` and so on, under `reasoning_projector.`.
    """

    def __init__(self, blocks: list[nn.Module], *, kind: ProjectorKind = "paper", gain_H: Tensor | None = None) -> None:
        super().__init__(blocks)
        if kind not in get_args(ProjectorKind):
            raise ValueError(f"projector kind: given {kind!r}, allowed {', '.join(get_args(ProjectorKind))}")
        if (kind != "paper") != (gain_H is not None):
            raise ValueError("a gain belongs to the projectors with norms, and only to them")
        self.kind: ProjectorKind = kind
        self.gain = None if gain_H is None else nn.Parameter(gain_H.detach().clone())

    @classmethod
    def from_mlp(
        cls, mlp: nn.Module, *, layers: int, hidden_size: int, kind: ProjectorKind = "paper", embedding_rms: float = 1.0
    ) -> ReasoningProjector:
        """Warm start: `layers` copies of `mlp`; the gain, if there is one, starts at the embeddings' scale.

        Raises:
            ValueError: fewer than one layer, or an MLP that is not a map from H to H.
        """
        if layers < 1:
            raise ValueError(f"projector layers: given {layers}, needed at least 1")
        weight = next(mlp.parameters())
        with torch.no_grad():
            out = mlp(torch.zeros(1, 1, hidden_size, dtype=weight.dtype, device=weight.device))
        if not isinstance(out, Tensor) or out.shape != (1, 1, hidden_size):
            raise ValueError(
                f"{type(mlp).__name__} does not map width {hidden_size} to itself, so it cannot be a projector block"
            )
        blocks = [copy.deepcopy(mlp) for _ in range(layers)]
        for block in blocks:
            block.requires_grad_(True)
        gain = torch.full((hidden_size,), embedding_rms, dtype=weight.dtype, device=weight.device)
        return cls(blocks, kind=kind, gain_H=gain if kind != "paper" else None)

    def forward(self, hidden: Tensor) -> Tensor:
        return projected(self, hidden, self.kind, self.gain)


def projected(blocks: Iterable[nn.Module], hidden: Tensor, kind: ProjectorKind, gain_H: Tensor | None) -> Tensor:
    """The projector's forward over blocks of whatever class; a gain for all kinds but `paper`."""
    if gain_H is None:
        for block in blocks:
            hidden = block(hidden)
        return hidden
    for block in blocks:
        out = block(rms_normalised(hidden))
        hidden = hidden + out if kind == "residual" else out
    return rms_normalised(hidden) * gain_H


def rms_normalised(hidden: Tensor) -> Tensor:
    """Unit root mean square over the last axis, computed in float32 or wider."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)).to(hidden.dtype)
