"""A sharded update is the update of one process: the same gradients and losses, for rows that differ wildly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrscale.latent import LatentPolicy
from tests.distributed.ranks import ROOT, Outcome, launch

pytestmark = pytest.mark.slow

TINY_BASE = ROOT / "lrscale/tasks/assets/tiny_base"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A live policy, and the same with latents of half the size: what an error in the latent chain looks like.

    The trained tiny base: gradients through the chain of a random model drown in the rounding of float32.
    """
    folder, weak = tmp_path_factory.mktemp("live"), tmp_path_factory.mktemp("weak")
    policy = LatentPolicy.from_pretrained(TINY_BASE, projector_kind="normalised")
    policy.save_pretrained(folder)
    with torch.no_grad():
        policy.projector.gain.mul_(0.5)
    policy.save_pretrained(weak)
    return folder, weak


def _errors(outcome: Outcome) -> tuple[float, float]:
    assert outcome.code == 0, outcome.stderr[-3000:]
    gradient = max(max(result["gradient_error"].values()) for result in outcome.results)
    loss = max(max(result["loss_error"].values()) for result in outcome.results)
    return gradient, loss


@pytest.mark.parametrize(
    ("kind", "ranks", "options"),
    [("zero3", 2, []), ("zero3", 4, []), ("zero3", 2, ["--checkpointing"]), ("fsdp2", 2, []), ("fsdp2", 4, [])],
)
def test_sharded_updates_are_those_of_one_process(
    kind: str, ranks: int, options: list[str], folders: tuple[Path, Path]
):
    gradient, loss = _errors(launch("equality", kind, str(folders[0]), str(folders[0]), *options, ranks=ranks))
    assert gradient < 1e-4
    assert loss < 1e-5


@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_control_latents_of_half_the_size_are_told_apart(kind: str, folders: tuple[Path, Path]):
    """A comparison that a dead or weak projector passes would prove nothing."""
    gradient, loss = _errors(launch("equality", kind, str(folders[0]), str(folders[1])))
    assert gradient > 1e-2
    assert loss > 1e-4
