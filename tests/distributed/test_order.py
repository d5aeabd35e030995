"""A mismatch of equal sizes is silent; the debugging mode makes it loud."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", ["same", "different"])
def test_the_first_different_call_is_named(case: str):
    outcome = launch("order", case)
    assert outcome.code == 0, outcome.stderr[-2000:]
    expected = (
        "" if case == "same" else "call 1: rank 0 ran forward 0, rank 1 forward 1; what was computed since is wrong"
    )
    assert [result["words"] for result in outcome.results] == [expected, expected]
