"""Rollouts on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrscale.records import Prompt, RolloutGroup, Score, ScoreFailed
from lrscale.stages.rollout_io import json_lines, load_rollouts, read_json_lines, save_groups, segments, write_whole
from tests.unit.latent.tiny_models import live_policy


@pytest.fixture(scope="module")
def policy():
    return live_policy(dtype=torch.float32)


@pytest.fixture(scope="module")
def rollouts(policy):
    prompts = [policy.encode("ab "), [*policy.encode("cd "), *policy.marker_ids(3)]]
    inside = [*policy.marker_ids(2), *policy.encode(" ef")]
    return policy.generate([*prompts, inside], max_new_tokens=10, seed=1)


def test_saved_rollouts_come_back_bit_for_bit(tmp_path: Path, policy, rollouts):
    """What is saved must replay to the same log-probs: decoded text could not."""
    group = RolloutGroup(Prompt("p", "text"), tuple(rollouts), (Score(1.0), ScoreFailed("error", "x"), Score(0.0)))
    save_groups(tmp_path / "a.jsonl", [group], policy, about={"arm": "latent"}, advantages_PG=torch.ones(1, 3))
    for found, saved in zip(load_rollouts(tmp_path / "a.jsonl"), rollouts, strict=True):
        assert (found.prompt_ids, found.completion_ids) == (saved.prompt_ids, saved.completion_ids)
        assert found.latent_spans == saved.latent_spans and found.stop_reason == saved.stop_reason
        assert torch.equal(found.latents_LH, saved.latents_LH) and torch.equal(found.logprobs_T, saved.logprobs_T)
    lines = read_json_lines(tmp_path / "a.jsonl")
    assert [line["reward"] for line in lines] == [1.0, None, 0.0], "a failed score must not read as 0"
    assert lines[1]["failed"] == "error" and lines[0]["advantage"] == 1.0 and lines[0]["arm"] == "latent"


def test_segments_show_the_latent_steps_of_the_completion_only(policy, rollouts):
    """A run inside the prompt is no part of what the model wrote; one that ends the prompt is."""
    assert all("text" in part for part in segments(policy, rollouts[0]))
    assert segments(policy, rollouts[1])[0] == {"latent_steps": 3}
    assert rollouts[2].latent_spans and all("text" in part for part in segments(policy, rollouts[2]))
    for rollout in rollouts:
        text = "".join(part.get("text", "") for part in segments(policy, rollout))
        assert text == b"".join(map(policy.detector.token_bytes, rollout.completion_ids)).decode(errors="replace")


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A crash while writing must not leave half a part of the traces."""
    path = tmp_path / "part.jsonl"
    write_whole(path, b"old")

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lrscale.stages.rollout_io.os.fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_texts_with_other_line_ends_stay_whole(tmp_path):
    """Locks out an undamaged file that is called damaged: splitlines cuts at more than line feeds."""
    entry = {"text": "one\u2028two\u0085three"}
    (tmp_path / "lines.jsonl").write_bytes(json_lines([entry, entry]))
    assert read_json_lines(tmp_path / "lines.jsonl") == [entry, entry]
