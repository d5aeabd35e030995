"""Engines on every node of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.programs.engines_by_node import prompts
from tests.distributed.ranks import launch
from tests.vllm.shared_memory import in_shared_memory, left_in_shared_memory
from tests.vllm.talkative_models import talkative_policy

pytestmark = pytest.mark.slow


def test_every_node_samples_from_its_own_engine_and_mends_it(tmp_path: Path):
    """Locks out ranks that ask another node's engine, weights that reach one node only, a projector alone sent to an
    engine that has no weights, and a death on one node that the others neither wait for nor survive.
    """
    shared = in_shared_memory()
    policy = talkative_policy("llama", "normalised")
    policy.save_pretrained(tmp_path / "model")
    outcome = launch(
        "engines_by_node", str(tmp_path / "model"), str(tmp_path / "run"), ranks_a_node=1, timeout_s=420
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr[-3000:]
    first, second = outcome.by_rank()
    assert (first["node"], second["node"]) == (0, 1)
    assert len(first["engines"]) == len(second["engines"]) == 1 and first["engines"] != second["engines"]
    assert (first["restarts"], second["restarts"]) == (0, 2)
    local = dict(policy.iter_generate(prompts(policy), max_new_tokens=24, temperature=0.0))
    for rank, found in enumerate((first, second)):
        for version, samples in zip((1, 1, 2), found["samples"], strict=True):
            ours = [local[place] for place in sorted(local)[rank::2]]
            assert samples == [[list(row.completion_ids), len(row.latents_LH), version] for row in ours]
    assert sum(len(row.latents_LH) for row in local.values()) > len(local)
    assert not left_in_shared_memory(shared)
