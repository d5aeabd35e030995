"""Decoding in the training process, with the very weights that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from lrscale.config.rollout import LocalRolloutConfig
from lrscale.latent import LatentPolicy
from lrscale.records import Rollout
from lrscale.rollout.engine import SamplingPlan


class LocalRollouts:
    """A RolloutEngine around the policy itself: there is one copy of the weights, so none has to travel."""

    def __init__(self, policy: LatentPolicy, config: LocalRolloutConfig) -> None:
        self.policy = policy
        self.config = config
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    def generate(self, prompts: Sequence[Sequence[int]], plan: SamplingPlan) -> Iterator[tuple[int, Rollout]]:
        config = self.config
        return self.policy.iter_generate(
            prompts,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            temperature=config.temperature if plan.temperature is None else plan.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            batch_rows=config.batch_rows,
            seed=plan.seed,
            mode=plan.mode,
            policy_version=self._version,
        )

    def load_weights(self, parameters: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Only the version moves; `parameters` are the weights already in use and are not even read."""
        self._version = version
