"""What the plan says a rank keeps and a checkpoint takes, against live tensors and files of DeepSpeed ZeRO-3."""

from __future__ import annotations

import pytest

from benchmarks.plan_against_reality import compare

_WANTED = (("1M", "float32"), ("25M", "bfloat16"))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_states_and_checkpoints_are_as_planned(ranks: int) -> None:
    """Locks out a plan that forgets masters, padding of partitions, tensors that stay whole, or headers of files.

    benchmarks/plan_against_reality.py prints the same for 120 M parameters.
    """
    compared = compare(_WANTED, ranks)
    assert len({(one.model, one.what) for one in compared}) == 2 * 8
    assert not [one for one in compared if abs(one.error) > 0.01]
