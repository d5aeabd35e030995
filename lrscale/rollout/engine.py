"""What a stage asks of whatever samples its sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lrscale.latent import LatentMode
from lrscale.records import Rollout


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How a set of prompts is decoded; together with the weights it decides every token."""

    seed: int
    mode: LatentMode = "real"
    temperature: float | None = None
    """None takes the recipe's."""


class RolloutEngine(Protocol):
    """Samples sequences with a known version of the policy's weights."""

    @property
    def version(self) -> int:
        """Version of the weights in use; every rollout carries it."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], plan: SamplingPlan, *, row_keys: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Rollout]]:
        """Yield (index of the prompt, rollout) as sequences finish.

        A row draws from a random stream named by the plan's seed and its key (its index where None) alone. With several ranks all of
        them call it, and iterate to the end.
        """
        ...

    def load_weights(
        self, parameters: Iterable[tuple[str, Tensor]], *, version: int, projector_only: bool = False
    ) -> None:
        """Take over the trained weights, or the projector's alone; rollouts from now on carry `version`. Collective."""
        ...

    def complete(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """This rank's rollouts with everything that replaying them needs. Collective; call it once sampling is done."""
        ...

    def rest(self) -> None:
        """Nothing is sampled for a while: the trainer may have the accelerator to itself. Collective."""
        ...

    def close(self) -> None:
        """End what was started for it."""
        ...
