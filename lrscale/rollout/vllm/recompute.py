"""Latents that the engine did not hand over, computed by the trainer: one batched expand a set of rollouts.

It gives the trainer's own log-probs along with them. Ranks that shard the weights run as many expands as the one that
needs most, and inside of each as many forwards (LatentPolicy.pace).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from lrscale.latent import LatentPolicy
from lrscale.records import Rollout


class Peers(Protocol):
    """The ranks of the trainer."""

    def most(self, *counts: int) -> tuple[int, ...]: ...

    def tick(self) -> None: ...


@torch.no_grad()
def recompute(
    policy: LatentPolicy, rollouts: Sequence[Rollout], peers: Peers, *, temperature: float, positions: int
) -> list[Rollout]:
    """The same rollouts with their latents and the trainer's log-probs. Collective.

    `positions` bounds a batch: rows times the longest of them.
    """
    done = list(rollouts)
    todo = [index for index, rollout in enumerate(rollouts) if rollout.trainer_logprobs_T is None]
    batches = [[todo[place] for place in batch] for batch in _batches([rollouts[index] for index in todo], positions)]
    (most,) = peers.most(len(batches))
    for chosen in [*batches, *[[]] * (most - len(batches))]:
        peers.tick()
        rows = [(*rollouts[index].prompt_ids, *rollouts[index].completion_ids) for index in chosen] or [(0,)]
        width = max(map(len, rows))
        ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=policy.device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=policy.device)
        out = policy.expand(ids_BT, mask_BT)
        logprobs_BT = policy.token_logprobs(out.hidden_BTH, ids_BT, temperature, where_BT=mask_BT)
        for row, index in enumerate(chosen):
            rollout = rollouts[index]
            start = len(rollout.prompt_ids)
            # A run that the length limit cut at the very end was taken in part.
            steps = sum(span.steps for span in rollout.latent_spans)
            done[index] = replace(
                rollout,
                latents_LH=out.latents[row][:steps].cpu(),
                trainer_logprobs_T=logprobs_BT[row, start : len(rows[row])].float().cpu(),
            )
    return done


def _batches(rollouts: Sequence[Rollout], positions: int) -> Iterator[list[int]]:
    """Rows alike in length together, since padding is computed too."""
    lengths = [len(r.prompt_ids) + len(r.completion_ids) + sum(s.steps for s in r.latent_spans) for r in rollouts]
    batch: list[int] = []
    for index in sorted(range(len(rollouts)), key=lambda index: (len(rollouts[index].latent_spans), lengths[index])):
        longest = max((lengths[other] for other in [*batch, index]), default=0)
        if batch and longest * (len(batch) + 1) > positions:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
