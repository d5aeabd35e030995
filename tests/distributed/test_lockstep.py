"""Ranks with different work run the same forwards; without lockstep the same cases hang, crash or come out wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lrscale.latent import LatentPolicy
from tests.distributed.ranks import ROOT, Program, launch, started

pytestmark = pytest.mark.slow

TINY_BASE = ROOT / "lrscale/tasks/assets/tiny_base"
CASES = ["markers", "backward", "single_steps", "heads", "decode", "batches"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("live")
    LatentPolicy.from_pretrained(TINY_BASE, projector_kind="normalised").save_pretrained(made)
    return made


def test_uneven_ranks_agree_in_lockstep(folder: Path):
    outcome = launch("uneven", str(folder), ",".join(CASES), "on", timeout_s=300)
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert [result["same"] for result in outcome.results] == [dict.fromkeys(CASES, True)] * 2


@pytest.fixture(scope="module")
def uncoordinated(folder: Path) -> Iterator[dict[str, Program]]:
    """Every case without lockstep, side by side: those that hang wait for gloo's time-out."""
    with ExitStack() as stack:
        yield {case: stack.enter_context(started("uneven", str(folder), case, "off")) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_control_without_lockstep_they_do_not(case: str, uncoordinated: dict[str, Program]):
    """Each case must be one that lockstep is needed for: it hangs, crashes or comes out wrong."""
    outcome = uncoordinated[case].outcome(timeout_s=90)
    assert outcome.code != 0 or [result["same"] for result in outcome.results] != [{case: True}] * 2
