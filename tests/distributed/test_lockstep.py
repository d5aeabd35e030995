"""Ranks with different work run the same forwards; without lockstep the same cases hang, crash or come out wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrscale.latent import LatentPolicy
from tests.distributed.ranks import ROOT, launch

pytestmark = pytest.mark.slow

TINY_BASE = ROOT / "lrscale/tasks/assets/tiny_base"
CASES = ["markers", "decode", "batches"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("live")
    LatentPolicy.from_pretrained(TINY_BASE, projector_kind="normalised").save_pretrained(made)
    return made


@pytest.mark.parametrize("case", CASES)
def test_uneven_ranks_agree_in_lockstep(case: str, folder: Path):
    outcome = launch("uneven", str(folder), case, "on", timeout_s=120)
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert [result["same"] for result in outcome.results] == [True, True]


@pytest.mark.parametrize("case", CASES)
def test_control_without_lockstep_they_do_not(case: str, folder: Path):
    """The cases must be ones that lockstep is needed for."""
    outcome = launch("uneven", str(folder), case, "off", timeout_s=60)
    well = outcome.code == 0 and [result["same"] for result in outcome.results] == [True, True]
    assert not well
