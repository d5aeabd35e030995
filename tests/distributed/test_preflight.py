"""The preflight of a job of two nodes, both on this machine: two launchers that meet, as node.sh starts them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from lrscale.config.load import load_recipe
from lrscale.launch.rundir import create_run
from tests.distributed.ranks import ROOT, free_port

pytestmark = pytest.mark.slow

NODES = ("n1", "n2")
TINY = Path(str(resources.files("lrscale"))) / "tasks" / "assets" / "tiny_base"
ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 2
machine_rank: 0
num_processes: 2
mixed_precision: 'no'
use_cpu: false
debug: false
"""


def make_run(folder: Path, *overrides: str) -> Path:
    sharded = ["parallel.kind=zero3", "parallel.ranks_per_node=1", "cluster.nodes=2", "name=run"]
    path = create_run(load_recipe((), [*sharded, *overrides]).recipe, folder, []).path
    (path / "accelerate.yaml").write_text(ACCELERATE)
    (path / "attempts" / "1").mkdir(parents=True)
    (path / "attempts" / "latest").symlink_to("1")
    return path


def preflight(run_dir: Path, home: dict[str, Path] | None = None) -> list[tuple[int, str]]:
    """Exit code and stderr of each node's launcher."""
    port = str(free_port())
    processes = []
    for rank, node in enumerate(NODES):
        command = [sys.executable, "-m", "lrscale.parallel.agent", "--config_file", str(run_dir / "accelerate.yaml")]
        command += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        command += ["--rdzv_backend", "static", "--same_network", "--max_restarts", "0"]
        command += ["--module", "lrscale.stages", "preflight", str(run_dir)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "SLURMD_NODENAME": node}
        env |= {"HF_HOME": str(home[node])} if home else {}
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        return [(process.wait(timeout=240), process.communicate()[1]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def findings(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for check in json.loads((run_dir / "attempts" / "1" / "preflight.json").read_text()):
        by_name.setdefault(check["name"], []).append(check)
    return by_name


def test_two_sound_nodes_pass_and_are_measured(tmp_path: Path) -> None:
    """Locks out looks that are skipped in a real job: each must have been made, by both nodes where it is theirs."""
    run_dir = make_run(tmp_path)
    ends = preflight(run_dir)
    assert [code for code, _ in ends] == [0, 0], ends
    found = findings(run_dir)
    for name in ("model files", "host memory"):
        assert [(check["node"], check["state"]) for check in found[name]] == [("n1", "ok"), ("n2", "ok")]
    for name in ("shared folder", "network", "all-reduce", "tokenizer", "markers", "disk", "reward"):
        assert [check["state"] for check in found[name]] == ["ok"], found[name]
    assert "2 ranks by gloo" in found["all-reduce"][0]["found"] and "GB/s" in found["all-reduce"][0]["found"]
    assert not (run_dir / "bad_nodes.txt").exists()
    assert "preflight passed" in ends[0][1] and ends[1][1] == ""
    assert not list(run_dir.glob(".preflight-*"))


def test_one_unfit_node_is_written_down_and_nothing_starts(tmp_path: Path) -> None:
    """Locks out a job that dies after an hour because one node lacks the model, and a requeue onto that same node."""
    run_dir = make_run(tmp_path, "model.path=anna/tiny", "model.device=cpu")
    home = {node: tmp_path / node for node in NODES}
    cached = home["n1"] / "hub" / "models--anna--tiny"
    shutil.copytree(TINY, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    ends = preflight(run_dir, home)
    assert [code for code, _ in ends] == [4, 4], ends
    found = findings(run_dir)
    assert [(check["node"], check["blames_node"]) for check in found["model"]] == [("n2", True)]
    assert found["all-reduce"][0]["state"] == "not checked"
    (line,) = (run_dir / "bad_nodes.txt").read_text().splitlines()
    assert line.startswith("n2 ") and "anna/tiny" in line
    assert "n2: " in ends[0][1] and "help: " in ends[0][1] and "nothing was started" in ends[0][1]
