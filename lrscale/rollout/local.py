"""Decoding in the training process: with the very weights that are trained, or with a whole copy of sharded ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lrscale.config.rollout import LocalRolloutConfig
from lrscale.latent import LatentPolicy
from lrscale.latent.hf_layout import PROJECTOR_PREFIX
from lrscale.records import Rollout
from lrscale.rollout.engine import SamplingPlan


class LocalRollouts:
    """A RolloutEngine around a policy of this process.

    `policy` is the trained one, sharded or not: sharded, all ranks decode in lockstep. Or it is a replica
    (`copies=True`): weights then travel with `load_weights`, and ranks decode on their own.
    """

    def __init__(self, policy: LatentPolicy, config: LocalRolloutConfig, *, copies: bool = False) -> None:
        self.policy = policy
        self.config = config
        self.copies = copies
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    def generate(
        self, prompts: Sequence[Sequence[int]], plan: SamplingPlan, *, row_keys: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Rollout]]:
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
            row_keys=row_keys,
            mode=plan.mode,
            policy_version=self._version,
        )

    @torch.no_grad()
    def load_weights(self, parameters: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Copies the weights into a replica; otherwise they are in use already and are not even read.

        Raises:
            ValueError: `parameters` are not exactly the replica's.
        """
        if self.copies:
            waiting = dict(_named(self.policy))
            for name, tensor in parameters:
                if name not in waiting or waiting[name].shape != tensor.shape:
                    raise ValueError(f"weights for rollout: {name} {list(tensor.shape)} is not one of the replica's")
                waiting.pop(name).copy_(tensor)
            if waiting:
                raise ValueError(
                    f"weights for rollout: {len(waiting)} tensors were not sent, {next(iter(waiting))} first"
                )
        self._version = version


def _named(policy: LatentPolicy) -> Iterator[tuple[str, Tensor]]:
    yield from policy.model.named_parameters()
    for name, parameter in policy.projector.named_parameters():
        yield PROJECTOR_PREFIX + name, parameter
