"""The launcher's environment variables."""

import pytest

from lrscale.parallel.ranks import Ranks, set_threads, visible_gpus


def test_from_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0) and Ranks().is_main
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks.from_environment() == Ranks(5, 8, 1) and not Ranks(5, 8, 1).is_main


def test_bad_values_are_named(monkeypatch):
    """Locks out a typo in a job script that silently makes every process rank 0."""
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ValueError, match="RANK='one'"):
        Ranks.from_environment()
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="RANK < WORLD_SIZE"):
        Ranks.from_environment()
    with pytest.raises(ValueError, match="threads"):
        set_threads(0)


def test_gpus_to_pass_on_are_named_as_this_process_was_given_them(monkeypatch):
    """Locks out an engine on a GPU that belongs to another job of the node."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5, GPU-3,1")
    assert visible_gpus() == ["7", "5", "GPU-3", "1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1", "2", "3"]
