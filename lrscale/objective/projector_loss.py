"""Cross-entropy of projector SFT: only tokens that can have seen a latent carry loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrscale.records import LatentSpan


def after_first_marker_mask(spans: Sequence[Sequence[LatentSpan]], attention_mask_BT: Tensor) -> Tensor:
    """[B, T] bool: real tokens after each row's first marker; all False in a row without one.

    spans: one sequence a row, as `MarkerDetector.find` gives them for the row's own tokens
    (positions count real tokens, so the padding may lie on either side). Take the detector's
    spans, not those of a forward with latents switched off: real, zero and shuffled latents are
    compared on the same tokens.
    """
    if len(spans) != attention_mask_BT.shape[0]:
        raise ValueError(f"spans for {len(spans)} rows, attention mask for {attention_mask_BT.shape[0]}: one a row")
    real_BT = attention_mask_BT.bool()
    index_BT = real_BT.long().cumsum(dim=1) - 1
    beyond = attention_mask_BT.shape[1]
    first_B = torch.tensor(
        [min((span.position for span in row), default=beyond) for row in spans], device=attention_mask_BT.device
    )
    return real_BT & (index_BT > first_B[:, None])


def projector_nll(logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[B] summed negative log-probability of each row's masked tokens (nats)."""
    if logprobs_BT.shape != mask_BT.shape:
        raise ValueError(f"log-probs are {list(logprobs_BT.shape)}, mask is {list(mask_BT.shape)}: same shape")
    return -torch.where(mask_BT.bool(), logprobs_BT, 0.0).sum(dim=1)


def projector_loss(logprobs_BT: Tensor, mask_BT: Tensor, normaliser: float | Tensor) -> Tensor:
    """The micro-batch's share of the cross-entropy: summed over masked tokens, divided by `normaliser`.

    normaliser: masked tokens of the whole update, over all micro-batches and ranks (positive).
    """
    if not float(normaliser) > 0:
        raise ValueError(f"normaliser must be positive (the update's tokens after a marker); given {float(normaliser)}")
    return projector_nll(logprobs_BT, mask_BT).sum() / normaliser
