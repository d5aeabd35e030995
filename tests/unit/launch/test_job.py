"""What a job on several ranks is started with: checked before anything is written."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import yaml

from lrscale.config.errors import RecipeError
from lrscale.config.load import load_recipe
from lrscale.launch.job import free_port, hidden_size_of, job_command, job_files, require_one_node, warnings_of

SHARDED = ["parallel.kind=zero3", "parallel.ranks_per_node=2"]


def test_one_process_needs_no_files_and_no_launcher(tmp_path: Path) -> None:
    """Locks out seconds of accelerate in front of the demo."""
    loaded = load_recipe()
    assert job_files(loaded) == {}
    assert job_command(loaded.recipe, tmp_path) == ("lrscale.stages", ["worker", str(tmp_path)])


def test_several_ranks_are_started_by_a_file_of_the_run(tmp_path: Path) -> None:
    """Locks out a configuration in somebody's cache that decides how many ranks there are."""
    loaded = load_recipe((), SHARDED)
    files = job_files(loaded)
    accelerate = yaml.safe_load(files["accelerate.yaml"])
    assert (accelerate["num_processes"], accelerate["mixed_precision"]) == (2, "no")
    module, arguments = job_command(loaded.recipe, tmp_path / "a b")
    assert module == "lrscale.parallel.agent"
    assert arguments[:2] == ["--config_file", str(tmp_path / "a b" / "accelerate.yaml")]
    assert arguments[-3:] == ["lrscale.stages", "worker", str(tmp_path / "a b")]


def test_deepspeed_gets_the_width_of_the_model() -> None:
    """Locks out buckets of the wrong size; the tiny model is 128 wide."""
    zero = json.loads(job_files(load_recipe((), SHARDED))["ds_config.json"])["zero_optimization"]
    assert zero["reduce_bucket_size"] == 128 * 128


def test_fsdp2_needs_no_deepspeed() -> None:
    assert set(job_files(load_recipe((), ["parallel.kind=fsdp2", "parallel.ranks_per_node=2"]))) == {"accelerate.yaml"}


def test_several_nodes_are_not_this_machine() -> None:
    """Locks out a 70B run that quietly trains on one node."""
    with pytest.raises(RecipeError) as caught:
        require_one_node(load_recipe(["llama3-70b-8n8g"]))
    (problem,) = caught.value.problems
    assert problem.key == "cluster.nodes" and problem.place.line > 0 and "--local" in problem.message


def test_a_ds_config_that_cannot_be_used_is_a_problem_of_the_recipe(tmp_path: Path) -> None:
    """Locks out a traceback, and a run directory that is made before the file is looked at."""
    path = tmp_path / "mine.json"
    for text, words in (("{", "cannot be read"), ("[]", "no JSON object"), ('{"fp16": {}}', "stage is None")):
        path.write_text(text)
        with pytest.raises(RecipeError) as caught:
            job_files(load_recipe((), [*SHARDED, f"parallel.ds_config={path}"]))
        assert words in str(caught.value) and caught.value.problems[0].key == "parallel.ds_config"


def test_the_width_is_read_where_it_can_be(tmp_path: Path) -> None:
    """A model that is not here, or of an unusual kind, is left to the ranks."""
    assert hidden_size_of("builtin:tiny") == 128
    assert hidden_size_of("nobody/has-this") is None
    assert hidden_size_of(str(tmp_path)) is None
    (tmp_path / "config.json").write_text('{"text_config": {"hidden_size": 48}}')
    assert hidden_size_of(str(tmp_path)) == 48


def test_the_port_is_free_and_low() -> None:
    """Locks out 29500, which everybody takes, and ports that the system may hand out meanwhile."""
    port = free_port()
    assert 20_000 <= port < 30_000
    with socket.socket() as bound:
        bound.bind(("", port))


def test_a_run_without_lockstep_is_warned_of() -> None:
    assert not warnings_of(load_recipe((), SHARDED).recipe)
    (warning,) = warnings_of(load_recipe((), [*SHARDED, "parallel.lockstep=false"]).recipe)
    assert "lockstep is false" in warning
