"""A job whose ranks wait for each other ends and names who is missing, instead of hanging until somebody looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.distributed.ranks import Program, started

pytestmark = pytest.mark.slow

MISSING = {
    "early": "rank 1 (in update, step 12",
    "busy": "rank 1 (in update, step 12 > score, step 12",
    "killed": "rank 1 (no sign of life)",
}
MOVING = ["slow", "working"]


@pytest.fixture(scope="module")
def jobs() -> Iterator[dict[str, Program]]:
    """All cases side by side: their ranks mostly wait."""
    with ExitStack() as stack:
        yield {case: stack.enter_context(started("stall", case)) for case in [*MISSING, *MOVING]}


@pytest.mark.parametrize("case", MISSING)
def test_the_missing_rank_is_named(case: str, jobs: dict[str, Program]):
    """An NCCL time-out two hours later says which collective, never which rank or why."""
    outcome = jobs[case].outcome(timeout_s=90)
    assert outcome.code not in (0, None), "the job must end, and not as if all were well"
    told = [result["message"] for result in outcome.results if result["rank"] == 0]
    assert len(told) == 1 and "in update, step 12; missing: " in told[0]
    assert MISSING[case] in told[0]


@pytest.mark.parametrize("case", MOVING)
def test_ranks_that_move_and_those_that_wait_for_them_are_left_alone(case: str, jobs: dict[str, Program]):
    """Locks out a job ended because one rank writes a large file, or waits for a slow judge."""
    outcome = jobs[case].outcome(timeout_s=90)
    assert outcome.code == 0 and [result["message"] for result in outcome.results] == ["done", "done"]
