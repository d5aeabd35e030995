"""An exported projector reaches the shards of a new run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrscale.latent import LatentPolicy
from lrscale.latent.hf_layout import PROJECTOR_PREFIX
from lrscale.latent.projector_folder import write_projector
from tests.distributed.programs.resume import digest
from tests.distributed.ranks import ROOT, launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_the_projector_of_a_folder_is_the_one_that_is_sharded(kind: str, tmp_path: Path):
    """Locks out a warm start from the last MLP where a trained projector was asked for."""
    policy = LatentPolicy.from_pretrained(ROOT / "lrscale/tasks/assets/tiny_base", projector_kind="normalised")
    with torch.no_grad():
        for parameter in policy.projector.parameters():
            parameter.mul_(1.5)
    tensors = {PROJECTOR_PREFIX + name: tensor for name, tensor in policy.projector.state_dict().items()}
    write_projector(tmp_path, policy.projector_fields, policy.backbone.hidden_size, tensors)
    outcome = launch("projector_path", kind, str(tmp_path))
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert outcome.by_rank()[0]["projector"] == {name: digest(tensor) for name, tensor in tensors.items()}
