"""Drift between what was recorded and what the trainer computes: expand against replay on the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lrscale.latent import LatentPolicy
from lrscale.records import RolloutGroup
from lrscale.stages.batching import padded

AUDITED_ROWS = 8


@torch.no_grad()
def audit_drift(policy: LatentPolicy, groups_P: Sequence[RolloutGroup], temperature: float) -> dict[str, float] | None:
    """Recompute the latents of a few rollouts and compare; keys as in metrics.jsonl.

    Cosine and L2 distance are between recomputed and recorded latents, the log-prob gap between
    expand and replay. Only for latents that were fed to the row they came from (mode `real`), with the
    weights that sampled them. None where no rollout holds latents.
    """
    found = [rollout for group in groups_P for rollout in group.rollouts if len(rollout.latents_LH)][:AUDITED_ROWS]
    if not found:
        return None
    ids_BT, mask_BT = padded([(*rollout.prompt_ids, *rollout.completion_ids) for rollout in found], policy.device)
    recorded = [rollout.latents_LH.to(policy.device) for rollout in found]
    expanded = policy.expand(ids_BT, mask_BT)
    replayed = policy.replay(ids_BT, mask_BT, recorded)
    # A run that the length limit cut at the very end was recorded in part.
    ours_LH = torch.cat([row[: len(kept)] for row, kept in zip(expanded.latents, recorded, strict=True)]).float()
    theirs_LH = torch.cat(recorded).float()
    gap_BT = (
        policy.token_logprobs(expanded.hidden_BTH, ids_BT, temperature, where_BT=mask_BT)
        - policy.token_logprobs(replayed.hidden_BTH, ids_BT, temperature, where_BT=mask_BT)
    ).abs()
    return {
        "rows": len(found),
        "latent_cosine_min": float(F.cosine_similarity(ours_LH, theirs_LH, dim=1).min()),
        "latent_l2_max": float((ours_LH - theirs_LH).norm(dim=1).max()),
        "logprob_gap_mean": float(gap_BT.sum() / mask_BT.sum()),
        "logprob_gap_max": float(gap_BT.max()),
    }
