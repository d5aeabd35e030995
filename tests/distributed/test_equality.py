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
    """A live policy, one whose LM head is its embedding, one with latents of half the size (what an error in the latent
    chain looks like), and one that puts other numbers on the same words.

    The trained tiny base: gradients through the chain of a random model drown in the rounding of float32. Its LM head is
    softened, for the rows are random words: a base this sure of itself loses 16 nats on each of them, and float32 the
    last digits of such losses.
    """
    made = {name: tmp_path_factory.mktemp(name) for name in ("live", "tied", "weak", "sharp")}
    policy = LatentPolicy.from_pretrained(TINY_BASE, projector_kind="normalised")
    policy.save_pretrained(made["sharp"])
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.25)
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
        ("fsdp2", 2, "live", ["--checkpointing"]),
        ("fsdp2", 4, "tied", []),
    ],
)
def test_sharded_updates_are_those_of_one_process(
    kind: str, ranks: int, policy: str, options: list[str], folders: dict[str, Path]
):
    folder = str(folders[policy])
    gradient, loss = _errors(launch("equality", kind, folder, folder, *options, ranks=ranks))
    assert gradient < 1e-4
    assert loss < 1e-5


@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_control_latents_of_half_the_size_are_told_apart(kind: str, folders: dict[str, Path]):
    """A comparison that a dead or weak projector passes would prove nothing."""
    gradient, loss = _errors(launch("equality", kind, str(folders["live"]), str(folders["weak"])))
    assert gradient > 1e-2
    assert loss > 1e-4


@pytest.mark.parametrize(
    ("policy", "gradients_alike", "losses_alike"),
    [("live", True, True), ("weak", False, True), ("sharp", False, False)],
)
def test_narrow_weights_with_wide_masters_whose_states_move_away_between_steps(
    *, policy: str, gradients_alike: bool, losses_alike: bool, folders: dict[str, Path]
):
    """bfloat16 rounds at 0.4 %, so bounds are wide, and the controls far outside of them.

    Half-sized latents change the gradients and hardly the loss of random words: the loss has a control of its own.
    """
    outcome = launch("equality", "zero3", str(folders["live"]), str(folders[policy]), "--bf16", "--park")
    gradient, loss = _errors(outcome)
    assert (gradient < 0.06) == gradients_alike
    assert (loss < 0.015) == losses_alike
