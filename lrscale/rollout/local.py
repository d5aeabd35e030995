"""Decoding in the training process: with the very weights that are trained, or with a whole copy of sharded ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lrscale.config.rollout import Sampling
from lrscale.latent import LatentPolicy
from lrscale.latent.hf_layout import PROJECTOR_PREFIX
from lrscale.records import Rollout
from lrscale.rollout.engine import SamplingPlan


class LocalRollouts:
    """A RolloutEngine around a policy of this process.

    `policy` is the trained one, sharded or not: sharded, all ranks decode in lockstep. Or it is a replica
    (`copies=True`): weights then travel with `load_weights`, and ranks decode on their own.
    """

    def __init__(self, policy: LatentPolicy, config: Sampling, *, copies: bool = False) -> None:
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

    def load_weights(
        self, parameters: Iterable[tuple[str, Tensor]], *, version: int, projector_only: bool = False
    ) -> None:
        """Copies the weights into a replica; otherwise they are in use already and are not even read.

        Raises:
            ValueError: `parameters` are not exactly the replica's, or its projector's.
        """
        if self.copies:
            for _ in self.copying(parameters, projector_only=projector_only):
                pass
        self._version = version

    def name_version(self, version: int) -> None:
        """The weights that are in use have this version."""
        self._version = version

    @torch.no_grad()
    def copying(
        self, parameters: Iterable[tuple[str, Tensor]], *, projector_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Pass the parameters on, each copied into the replica. ValueError as `load_weights` raises it."""
        waiting = {
            name: held for name, held in _named(self.policy) if not projector_only or name.startswith(PROJECTOR_PREFIX)
        }
        for name, tensor in parameters:
            if name not in waiting or waiting[name].shape != tensor.shape:
                raise ValueError(f"weights for rollout: {name} {list(tensor.shape)} is not one of the replica's")
            waiting.pop(name).copy_(tensor)
            yield name, tensor
        if waiting:
            raise ValueError(f"weights for rollout: {len(waiting)} tensors were not sent, {next(iter(waiting))} first")

    def complete(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        return list(rollouts)  # latents were recorded as they were made

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass


def _named(policy: LatentPolicy) -> Iterator[tuple[str, Tensor]]:
    yield from policy.model.named_parameters()
    for name, parameter in policy.projector.named_parameters():
        yield PROJECTOR_PREFIX + name, parameter
