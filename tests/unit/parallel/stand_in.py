"""A policy small enough for optimizer tests: a tied and a plain weight, a buffer, and a projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrscale.config.optimisation import OptimisationConfig
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.single import SingleEngine


class TiedModel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.mlp = nn.Linear(width, width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1))


class SmallPolicy(nn.Module):
    def __init__(self, width: int = 5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = TiedModel(width)
        self.projector = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.to(dtype)

    def loss(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 7, (6,), generator=generator)
        hidden = self.model.mlp(self.model.embed(ids)) * self.model.scale
        for block in self.projector:
            hidden = hidden + block(hidden)
        return nn.functional.cross_entropy(self.model.head(hidden).float(), ids.flip(0))


def small_engine(width: int = 5, dtype: torch.dtype = torch.float32, **settings) -> SingleEngine:
    return SingleEngine(SmallPolicy(width, dtype), OptimisationConfig(**settings), ranks=Ranks())


def update(engine: SingleEngine, group: str, seed: int, learning_rate: float = 1e-2) -> float:
    with engine.training(group):
        engine.backward(engine.policy.loss(seed))
        return engine.step(group, learning_rate=learning_rate, max_grad_norm=1.0)


def weights(engine: SingleEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.full_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
