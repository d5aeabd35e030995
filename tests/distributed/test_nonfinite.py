"""A NaN on one rank stops all ranks before any weight moves, with one message that names step, rank and sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrscale.latent import LatentPolicy
from tests.distributed.ranks import ROOT, launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_all_ranks_stop_and_name_the_sample(kind: str, tmp_path: Path):
    base = ROOT / "lrscale/tasks/assets/tiny_base"
    LatentPolicy.from_pretrained(base, projector_kind="normalised").save_pretrained(tmp_path)
    outcome = launch("nonfinite", kind, str(tmp_path))
    assert outcome.code == 0, outcome.stderr[-3000:]
    first, second = outcome.by_rank()
    assert first["words"] == second["words"] and first["unchanged"] and second["unchanged"]
    assert "RL step 7: loss is nan" in first["words"] and f"samples {first['name']}" in first["words"]
    assert first["words"].startswith("rank ")
