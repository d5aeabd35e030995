"""The buffer of right traces between two refreshes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrscale.records import Prompt, Rollout, RolloutGroup, Score, ScoreFailed
from lrscale.stages.refresh import RefreshBuffer
from lrscale.stages.rollout_io import StateDamagedError


def _group(name: str) -> RolloutGroup:
    rollout = Rollout((1,), (2, 3), torch.zeros(2), (), torch.zeros(0, 4), 0, "stop")
    return RolloutGroup(Prompt(name, "x"), (rollout,) * 3, (Score(1.0), Score(0.0), ScoreFailed("error", "x")))


def test_going_on_cuts_the_buffer_back_to_the_checkpoint(tmp_path: Path):
    """Traces of steps that are run again would be in it twice."""
    buffer = RefreshBuffer(tmp_path, "latent", 0, 0)
    buffer.add([_group("a")])
    size = buffer.size_bytes
    buffer.add([_group("b")])
    resumed = RefreshBuffer(tmp_path, "latent", 0, size)
    assert [trace.prompt_id for trace in resumed.traces()] == ["a"], "one right sample of three"
    resumed.add([_group("c")])
    assert [trace.prompt_id for trace in resumed.traces()] == ["a", "c"]


def test_each_epoch_begins_empty(tmp_path: Path):
    RefreshBuffer(tmp_path, "latent", 0, 0).add([_group("a")])
    assert RefreshBuffer(tmp_path, "latent", 1, 0).traces() == []
    assert RefreshBuffer(tmp_path, "shuffled_latent", 0, 0).traces() == []


def test_a_buffer_that_lost_lines_is_noticed(tmp_path: Path):
    with pytest.raises(StateDamagedError, match="lost lines"):
        RefreshBuffer(tmp_path, "latent", 0, 100)
