"""Real jobs: accelerate, gloo, ZeRO-3 and the tiny model on two nodes of two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, Run, read_json, wait_until
from tests.cluster.scripted import ready
from tests.distributed.ranks import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def launch(cluster: Cluster, folder: Path, *arguments: str) -> Run:
    done = cluster.lrscale("launch", *arguments, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    run = Run(cluster, folder / told["run_dir"])
    assert run.job_id == told["job_id"]
    return run


@pytest.fixture(scope="module")
def launched(cluster: Cluster, folder: Path, recipe: Path) -> Run:
    """By `lrscale launch`; nothing interrupts it."""
    return launch(cluster, folder, str(recipe), "--nodes", "2", "--name", "whole")


@pytest.fixture(scope="module")
def by_hand(cluster: Cluster, folder: Path, recipe: Path, launched: Run) -> Run:
    """By sbatch, at the same time on the same nodes."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--cpus-per-task=4",
        "--mem=1G",
        "--time=60",
        "--exclude=node1,node2",
    ]
    command += [str(ROOT / "slurm" / "train.sh"), str(recipe), "--name", "by-hand"]
    env = cluster.environment | {"PATH": path}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    run = Run(cluster, folder / "runs" / "by-hand")
    wait_until((run.path / "jobs.jsonl").is_file, f"the job's run directory: {done.stdout}")
    assert run.job_id == int(done.stdout) and run.jobs[0]["sbatch"] is None
    return run


def test_a_drained_job_that_then_loses_a_node_ends_as_if_nothing_had_been(launched: Run, by_hand: Run) -> None:
    """Locks out work that is lost or repeated between attempts, and a job by hand that has fewer rights.

    The first attempt saves because it is asked to, the second ends with its node and goes back to what the first saved.
    """
    wait_until(lambda: by_hand.steps("projector_sft"), f"a first step: {by_hand.logs()}")
    by_hand.cluster.call("scancel", "--signal=USR2", "--batch", str(by_hand.job_id))
    first = by_hand.end(1)
    assert first["state"] == "requeued", (first, by_hand.logs())
    mark = read_json(by_hand.attempt(1) / "checkpointed")
    assert mark["stage"] in ("projector_sft", "latent") and mark["step"] in (1, 2), mark
    wait_until((by_hand.attempt(2) / "rank0.log").is_file, "the second attempt")
    done = mark["step"] if mark["stage"] == "latent" else 0
    wait_until(lambda: len(by_hand.steps("rl")) > done, f"a step of the second attempt: {by_hand.logs(2)}")
    by_hand.cluster.lose("node4")
    assert by_hand.end(2)["state"] == "requeued" and "one failed" in by_hand.end(2)["reason"], by_hand.logs(2)
    assert by_hand.end(3)["state"] == "finished", by_hand.logs(3)
    assert read_json(by_hand.attempt(3) / "job.json")["restart_count"] == 2
    assert launched.end()["state"] == "finished"
    assert by_hand.metrics() == launched.metrics()


def test_two_nodes_of_two_ranks_train_to_the_end(launched: Run, by_hand: Run) -> None:
    """Locks out a launch that quietly runs two jobs of one process each, and files that a run's readers rely on."""
    assert launched.end() == launched.end() | {"state": "finished", "reason": "done"}, launched.logs()
    attempt = launched.attempt()
    assert [read_json(attempt / f"rank{rank}-exit.json")["code"] for rank in range(4)] == [0, 0, 0, 0]
    assert not (attempt / "rank4.log").exists() and (attempt / "node-1.log").is_file()
    assert launched.steps("rl") == [1, 2, 3]
    job = read_json(attempt / "job.json")
    assert (job["job_id"], job["restart_count"], len(job["nodes"])) == (launched.job_id, 0, 2)
    assert os.readlink(launched.path / "attempts" / "latest") == "1"
    assert launched.cluster.wait(launched.job_id) == "COMPLETED"


def test_a_time_limit_that_comes_too_early_is_no_end(late: Run) -> None:
    """Locks out a run that stands still from its first time limit on, though it had saved an older checkpoint."""
    assert late.end(1)["state"] == "requeued" and "the time limit came" in late.end(1)["reason"], late.logs()
    ready(late, 2)
    late.cluster.cancel(late.job_id)
