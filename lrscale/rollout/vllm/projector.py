"""The Reasoning Projector inside vLLM, sharded over tensor-parallel ranks as the base model's MLPs are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaMLP

from lrscale.latent.hf_layout import PROJECTOR_PREFIX, ProjectorFields
from lrscale.latent.projector import projected

_MERGED = {"gate_proj": 0, "up_proj": 1}
"""vLLM keeps both in one parameter, gate_up_proj; the number is the part's place in it."""


class ParallelProjector(nn.ModuleList):
    """`lrscale.latent.ReasoningProjector` in vLLM's layers; [N, H] to [N, H], complete on every rank.

    Never quantised: its blocks are multiplied with each other, which amplifies rounding.
    """

    def __init__(self, config: object, fields: ProjectorFields, prefix: str) -> None:
        blocks = [
            LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                bias=getattr(config, "mlp_bias", False),
                prefix=f"{prefix}.{index}",
            )
            for index in range(fields.layers)
        ]
        super().__init__(blocks)
        self.kind = fields.kind
        normed = fields.kind != "paper"
        self.gain = nn.Parameter(torch.ones(config.hidden_size), requires_grad=False) if normed else None

    def forward(self, hidden: Tensor) -> Tensor:
        return projected(self, hidden, self.kind, self.gain)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take tensors by the names they have in a checkpoint, prefix removed. ValueError for a name it lacks."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            part = next((part for part in _MERGED if f".{part}." in name), None)
            target = name if part is None else name.replace(part, "gate_up_proj")
            if target not in parameters:
                raise ValueError(f"{PROJECTOR_PREFIX}{name} is none of this projector's tensors ({len(self)} blocks)")
            load = getattr(parameters[target], "weight_loader", default_weight_loader)
            load(parameters[target], tensor, *([] if part is None else [_MERGED[part]]))
            loaded.add(target)
        return loaded
