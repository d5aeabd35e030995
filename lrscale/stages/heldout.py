"""Does the projector say anything? Held-out loss after markers with real, no and shuffled latents.

The same rows, the same tokens, three ways. A projector that helps against none but not against
shuffled latents gives the model room to think, yet carries no content: look at both differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from lrscale.latent import LatentMode, LatentPolicy
from lrscale.objective import after_first_marker_mask, projector_nll
from lrscale.parallel.lockstep import ALONE, Lockstep
from lrscale.stages.batching import micro_batches, padded
from lrscale.stages.lite_rows import LiteRow

MODES: tuple[LatentMode, ...] = get_args(LatentMode)


@torch.no_grad()
def heldout_losses(
    policy: LatentPolicy, rows: Sequence[LiteRow], micro_batch_tokens: int, lockstep: Lockstep = ALONE
) -> dict[str, float | None] | None:
    """Losses a token (nats) by mode and their paired differences with standard errors; keys as in metrics.jsonl.

    The micro-batches are those of one process, shared out over the ranks: shuffled latents depend on them.
    None for fewer than two rows: latents cannot be shuffled then.
    """
    if len(rows) < 2:
        return None
    nll = {mode: torch.zeros(len(rows), dtype=torch.float64) for mode in MODES}
    tokens_R = torch.zeros(len(rows), dtype=torch.float64)
    batches = micro_batches([row.positions for row in rows], micro_batch_tokens, least_rows=2)
    world = lockstep.ranks.world_size
    for first in range(0, len(batches), world):
        mine = first + lockstep.ranks.rank
        counts = mine < len(batches)  # a rank without a batch runs one that is another's, and keeps nothing of it
        batch = batches[mine if counts else first]
        ids_BT, mask_BT = padded([rows[index].ids for index in batch], policy.device)
        counted_BT = after_first_marker_mask([rows[index].spans for index in batch], mask_BT)
        tokens_R[batch] = counted_BT.sum(1).double().cpu() * counts
        for mode in MODES:
            out = policy.expand(ids_BT, mask_BT, mode)
            logprobs_BT = policy.token_logprobs(out.hidden_BTH, ids_BT, where_BT=counted_BT)
            nll[mode][batch] = projector_nll(logprobs_BT.double(), counted_BT).cpu() * counts
    tokens_R = lockstep.sum(tokens_R)
    nll = {mode: lockstep.sum(values_R) for mode, values_R in nll.items()}
    clusters = [row.prompt_id for row in rows]
    real, real_se = ratio_with_error(nll["real"], tokens_R, clusters)
    losses: dict[str, float | None] = {"rows": len(rows), "prompts": len(set(clusters))}
    losses |= {"loss_real": real, "loss_real_se": real_se}
    for mode in ("zero", "shuffled"):
        losses[f"loss_{mode}"] = ratio_with_error(nll[mode], tokens_R, clusters)[0]
        difference, error = ratio_with_error(nll["real"] - nll[mode], tokens_R, clusters)
        losses[f"real_minus_{mode}"] = difference
        losses[f"real_minus_{mode}_se"] = error
    return losses


def ratio_with_error(values_R: Tensor, weights_R: Tensor, clusters: Sequence[str]) -> tuple[float, float | None]:
    """sum(values) / sum(weights) and its standard error (linearised), rows of one cluster taken together.

    The rows of one prompt are several traces, each at several ratios: far from independent, so the
    error is taken over prompts. None where there is one prompt only: no error is known then.
    """
    total = float(weights_R.sum())
    ratio = float(values_R.sum()) / total
    residual: dict[str, float] = {}
    for cluster, value in zip(clusters, (values_R - ratio * weights_R).tolist(), strict=True):
        residual[cluster] = residual.get(cluster, 0.0) + value
    count = len(residual)
    if count < 2:
        return ratio, None
    squares = math.fsum(value * value for value in residual.values())
    return ratio, math.sqrt(squares * count / (count - 1)) / total
