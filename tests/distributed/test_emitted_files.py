"""Every accelerate.yaml and ds_config.json that a shipped recipe leads to, read by the real accelerate and DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrscale.config.load import load_recipe
from lrscale.config.shipped import shipped_recipes
from lrscale.launch import on_slurm
from tests.distributed.ranks import ROOT

pytestmark = pytest.mark.slow


def test_accelerate_and_deepspeed_read_what_is_emitted(tmp_path: Path) -> None:
    """Locks out keys that one of them refuses, "auto" that nobody fills in, and numbers that do not multiply.

    Recipes of one process are spread over two nodes for this; one that is sharded already keeps its own nodes too.
    """
    wanted = {}
    for name in shipped_recipes():
        own = load_recipe([name], slurm=True).recipe
        sizes = [(own.cluster.nodes, own.ranks_per_node)] if own.world_size > 1 else []
        for nodes, ranks in [*sizes, (2, 2)]:
            over = [
                f"cluster.nodes={nodes}",
                f"name={name}-{nodes}",
                "parallel.kind=zero3",
                f"cluster.gpus_per_node={ranks}",
            ]
            over += ["parallel.ranks_per_node=null", "cluster.gpu_memory_gib=9999"]
            planned = on_slurm.plan(load_recipe([name], over, slurm=True), tmp_path, dry=True, say=lambda text: None)
            run = on_slurm.write(planned, tmp_path, ["launch"], dry=True)
            wanted[run.path.name] = (nodes, nodes * ranks)
    command = [sys.executable, "-m", "tests.distributed.programs.emitted", *(str(tmp_path / name) for name in wanted)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("emitted ") for line in done.stdout.splitlines() if line.startswith("emitted ")]
    found = {entry["name"]: entry for entry in map(json.loads, lines)}
    assert set(found) == set(wanted)
    for name, (nodes, ranks) in wanted.items():
        launcher, engine = found[name]["launcher"], found[name]["engine"]
        assert launcher == {
            "num_machines": nodes, "num_processes": ranks, "machine_rank": 1, "multi_gpu": True, "use_deepspeed": False,
            "mixed_precision": "no", "rdzv_backend": "static", "same_network": True, "use_cpu": False,
            "deepspeed_multinode_launcher": "standard",
        }  # fmt: skip
        assert (engine["world_size"], engine["train_batch_size"], engine["stage"]) == (ranks, ranks, 3)
    large = found["llama3-70b-8n8g-8"]["engine"]
    assert (large["reduce_bucket_size"], large["prefetch"], large["persistence"]) == (67_108_864, 60_397_977, 81_920)
