"""Rollout engines as a role of their own: what is refused, and what address they tell."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lrscale.config.recipe import Recipe
from lrscale.rollout.vllm.settings import own_address
from lrscale.stages.rollout_engines import engine_variables
from lrscale.stages.serve_rollouts import engines_here, main


def test_runs_without_such_engines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Locks out a role that waits for a trainer which will never ask for it."""
    assert main([str(tmp_path)]) == 7
    for rollout in ({}, {"kind": "vllm"}):
        (tmp_path / "recipe.json").write_text(Recipe.model_validate({"rollout": rollout}).model_dump_json())
        assert main([str(tmp_path)]) == 3
        assert "placement: separate" in capsys.readouterr().err


def test_engines_are_shared_out_among_the_nodes_of_the_role():
    """Locks out a node that starts more engines than its GPUs hold, and a trainer that waits for one too many."""
    role = {"name": "rollout", "nodes": 2, "command": "lrscale serve-rollouts RUN"}
    cluster = {"gpus_per_node": 8, "split": {"roles": [role]}}
    for device, engines, width, here in (("cuda", 4, 4, 2), ("cuda", 2, 8, 1), ("cpu", 3, 1, 2)):
        rollout = {"kind": "vllm", "placement": "separate", "engines": engines, "tensor_parallel": width}
        recipe = Recipe.model_validate({"model": {"device": device}, "rollout": rollout, "cluster": cluster})
        assert engines_here(recipe, recipe.rollout) == here


def test_every_engine_of_a_node_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """Locks out two engines on the same GPUs, the second of which finds no memory there."""
    recipe = Recipe.model_validate({"rollout": {"kind": "vllm", "tensor_parallel": 2}})
    monkeypatch.setattr("lrscale.stages.rollout_engines.visible_gpus", lambda: ["4", "5", "6", "7", "8"])
    gpus = [engine_variables(recipe, recipe.rollout, index)["CUDA_VISIBLE_DEVICES"] for index in (0, 1)]
    assert gpus == ["4,5", "6,7"]
    with pytest.raises(ValueError, match="engine 2 of this node needs"):
        engine_variables(recipe, recipe.rollout, 2)


def test_the_address_told_to_other_nodes_is_none_of_loopback(monkeypatch: pytest.MonkeyPatch):
    """Locks out engines of another node that the trainer looks for on its own: /etc/hosts names them 127.0.1.1."""

    def resolved(*addresses: str) -> None:
        monkeypatch.setattr(socket, "gethostbyname_ex", lambda name: (name, [], list(addresses)))

    resolved("127.0.1.1", "10.1.2.3")
    assert own_address() == "10.1.2.3"
    resolved("127.0.1.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            expected = probe.getsockname()[0]
        except OSError:
            expected = "127.0.0.1"
    assert own_address() == expected
