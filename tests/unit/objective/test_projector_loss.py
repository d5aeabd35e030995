"""Which tokens carry the projector's loss, and that it adds up over micro-batches."""

import math

import pytest
import torch

from lrscale.objective import after_first_marker_mask, projector_loss, projector_nll
from lrscale.records import LatentSpan

SPANS = ((LatentSpan(2, 3), LatentSpan(4, 1)), (), (LatentSpan(0, 1),), (LatentSpan(3, 2),))
LENGTHS = (6, 5, 3, 4)


def masks(*, left: bool):
    attention = torch.zeros(4, 6, dtype=torch.long)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    for row, (spans, length) in enumerate(zip(SPANS, LENGTHS, strict=True)):
        offset = 6 - length if left else 0
        for t in range(length):
            attention[row, offset + t] = 1
            expected[row, offset + t] = bool(spans) and t > spans[0].position
    return attention, expected


@pytest.mark.parametrize("left", [False, True])
def test_only_tokens_after_the_first_marker(left):
    """Locks out an off-by-one at the marker, padding in the loss, and masks that break under left padding."""
    attention, expected = masks(left=left)
    assert torch.equal(after_first_marker_mask(SPANS, attention), expected)


def test_loss_adds_up_and_ignores_masked_garbage():
    """Locks out a per-micro-batch mean, and NaN at masked tokens."""
    _, mask = masks(left=False)
    logprobs = torch.where(mask, -torch.rand(4, 6, dtype=torch.float64) - 0.1, math.nan).requires_grad_()
    count = int(mask.sum())
    whole = projector_loss(logprobs, mask, count)
    plain = -sum(float(logprobs.detach()[b, t]) for b in range(4) for t in range(6) if mask[b, t]) / count
    parts = sum(projector_loss(logprobs[rows], mask[rows], count) for rows in (slice(0, 1), slice(1, 4)))
    assert float(whole.detach()) == pytest.approx(plain, rel=1e-12) == pytest.approx(float(parts.detach()), rel=1e-12)
    whole.backward()
    torch.testing.assert_close(logprobs.grad, -mask.double() / count)
    assert float(projector_nll(logprobs.detach(), mask)[1]) == 0.0


def test_bad_inputs_are_named():
    attention, mask = masks(left=False)
    with pytest.raises(ValueError, match="one a row"):
        after_first_marker_mask(SPANS[:2], attention)
    with pytest.raises(ValueError, match="normaliser"):
        projector_loss(torch.zeros(4, 6), mask, 0)
    with pytest.raises(ValueError, match="same shape"):
        projector_nll(torch.zeros(4, 5), mask)
