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
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A live policy, one whose LM head is its embedding, and one with latents of half the size: what an error in the
    latent chain looks like.

    The trained tiny base: gradients through the chain of a random model drown in the rounding of float32.
    """
    made = {name: tmp_path_factory.mktemp(name) for name in ("live", "tied", "weak")}
    policy = LatentPolicy.from_pretrained(TINY_BASE, projector_kind="normalised")
    policy.save_pretrained(made["live"])
    with torch.no_grad():
        policy.projector.gain.mul_(0.5)
    policy.save_pretrained(made["weak"])
    policy = LatentPolicy.from_pretrained(TINY_BASE, projector_kind="normalised")
    policy.model.config.tie_word_embeddings = True
    policy.model.tie_weights()
    policy.save_pretrained(made["tied"])
    return made


def _errors(outcome: Outcome) -> tuple[float, float]:
    assert outcome.code == 0, outcome.stderr[-3000:]
    gradient = max(max(result["gradient_error"].values()) for result in outcome.results)
    loss = max(max(result["loss_error"].values()) for result in outcome.results)
    return gradient, loss


@pytest.mark.parametrize(
    ("kind", "ranks", "policy", "options"),
    [
        ("zero3", 2, "live", []),
        ("zero3", 2, "live", ["--checkpointing", "--offload"]),
        ("zero3", 4, "tied", ["--persistent"]),
        ("fsdp2", 2, "live", []),
        ("fsdp2", 4, "tied", []),
    ],
)
def test_sharded_updates_are_those_of_one_process(
    kind: str, ranks: int, policy: str, options: list[str], folders: dict[str, Path]
):
    folder = str(folders[policy])
    outcome = launch("equality", kind, folder, folder, *options, ranks=ranks)
    gradient, loss = _errors(outcome)
    assert gradient < 1e-4
    assert loss < 1e-5, outcome.results[0]["losses"]


@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_control_latents_of_half_the_size_are_told_apart(kind: str, folders: dict[str, Path]):
    """A comparison that a dead or weak projector passes would prove nothing."""
    gradient, loss = _errors(launch("equality", kind, str(folders["live"]), str(folders["weak"])))
    assert gradient > 1e-2
    assert loss > 1e-4


@pytest.mark.parametrize(("policy", "alike"), [("live", True), ("weak", False)])
def test_narrow_weights_with_wide_masters_whose_states_move_away_between_steps(
    *, policy: str, alike: bool, folders: dict[str, Path]
):
    """bfloat16 rounds at 0.4 %, so bounds are wide, and the control far outside of them."""
    outcome = launch("equality", "zero3", str(folders["live"]), str(folders[policy]), "--bf16", "--park")
    gradient, loss = _errors(outcome)
    assert (gradient < 0.06) == alike  # what tells them apart: the losses, relative to their size, are alike in both
    assert loss < 0.015
