"""The plan's micro-batches against those that the stages cut."""

from __future__ import annotations

import random

import pytest

from lrscale.plan.packing import packed
from lrscale.stages.batching import rounds


@pytest.mark.parametrize(("rows", "ranks", "budget"), [(768, 64, 16384), (96, 1, 4096), (50, 8, 3000), (7, 16, 9000)])
def test_rows_are_packed_as_the_stages_pack_them(rows: int, ranks: int, budget: int) -> None:
    """Locks out a plan that divides positions by ranks, and forgets padding and ranks that wait."""
    draw = random.Random(rows)
    lengths = tuple(min(2800, int(draw.lognormvariate(6.5, 0.6))) + 100 for _ in range(rows))
    real = rounds(lengths, budget, ranks)
    dearest = [max(max((lengths[i] for i in batch), default=0) * len(batch) for batch in one) for one in real]
    found = packed(lengths, budget, ranks)
    assert found.rounds == len(real)
    assert found.positions == pytest.approx(ranks * sum(dearest), rel=0.02)
    assert found.positions >= sum(lengths)


def test_optimizer_steps_are_packed_one_by_one() -> None:
    assert packed((10, 10, 10, 10), 40, 1, 2) == (40, 2)
    assert packed((10, 10, 10, 10), 40, 1) == (40, 1)
