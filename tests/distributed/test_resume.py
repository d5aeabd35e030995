"""What N ranks saved, M ranks of any kind go on from; and the exported model is the trained one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrscale.latent import LatentPolicy
from tests.distributed.programs.resume import digest
from tests.distributed.ranks import ROOT, launch

pytestmark = pytest.mark.slow

TINY_BASE = ROOT / "lrscale/tasks/assets/tiny_base"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy, and one with all weights scrambled: what is not restored cannot hide."""
    live, scrambled = tmp_path_factory.mktemp("live"), tmp_path_factory.mktemp("scrambled")
    policy = LatentPolicy.from_pretrained(TINY_BASE, projector_kind="normalised")
    policy.save_pretrained(live)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    policy.save_pretrained(scrambled)
    return live, scrambled


@pytest.mark.parametrize(
    ("kind", "others"),
    [("zero3", [("zero3", 4), ("zero3", 1), ("fsdp2", 2)]), ("fsdp2", [("single", 1), ("zero3", 2)])],
)
def test_any_number_of_ranks_goes_on(
    kind: str, others: list[tuple[str, int]], folders: tuple[Path, Path], tmp_path: Path
):
    """Frozen weights too: neither universal nor exclude-frozen checkpoints of DeepSpeed bring them back."""
    checkpoint, export = tmp_path / "checkpoint", tmp_path / "export"
    saved = launch("resume", "save", kind, str(folders[0]), str(checkpoint), str(export))
    assert saved.code == 0, saved.stderr[-3000:]
    expected = saved.by_rank()[0]
    for other, ranks in [(kind, 2), *others]:
        loaded = launch("resume", "load", other, str(folders[1]), str(checkpoint), ranks=ranks)
        assert loaded.code == 0, loaded.stderr[-3000:]
        found = loaded.by_rank()[0]
        assert found["weights"] == expected["weights"], "restored bit for bit"
        # Where another kind of engine goes on, relative: the last place of a float32 loss of 16 is worth 2e-6.
        within = {"abs": 1e-6} if kind == "zero3" else {"rel": 1e-6}
        assert found["losses"] == pytest.approx(expected["losses"], **within)
        if (other, ranks) == (kind, 2):
            assert found["losses"] == expected["losses"], "as many ranks of the same kind: bit for bit"
    _check_export(export, expected["weights"])


def _check_export(folder: Path, live: dict[str, str]) -> None:
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 1, "a small limit must give several files"
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {name: digest(tensor) for name, tensor in tensors.items()} == live
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert digest(plain.get_input_embeddings().weight.detach()) == live["model.embed_tokens.weight"]
    policy = LatentPolicy.from_pretrained(folder)
    assert digest(policy.projector.gain.detach()) == live["reasoning_projector.gain"]
