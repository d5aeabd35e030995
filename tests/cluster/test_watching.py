"""lrscale status, logs, stop, resume, list and doctor, against real jobs in every state."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import NODES, Cluster, read_json, wait_until

pytestmark = pytest.mark.slow

STEPS = 6
TINY = Path(str(resources.files("lrscale"))) / "tasks" / "assets" / "tiny_base"


def launch(cluster: Cluster, folder: Path, recipe: Path, *settings: str, nodes: int = 2) -> int:
    """Submit a run named `run` with a rank on each node; its job id."""
    options = [word for setting in ("parallel.ranks_per_node=1", *settings) for word in ("--set", setting)]
    done = cluster.lrscale("launch", str(recipe), "--name", "run", "--nodes", str(nodes), *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def status(cluster: Cluster, folder: Path, *, code: int = 0) -> dict[str, Any]:
    done = cluster.lrscale("status", "run", "--json", cwd=folder)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def full(cluster: Cluster) -> Iterator[int]:
    """Something else holds all nodes, until it is cancelled. What tests before have left goes first: in a process that
    runs only some of them nobody may have waited for it."""
    for left in set(cluster.call("squeue", "--noheader", "--format=%A").split()):
        cluster.cancel(int(left))
    said = cluster.call("sbatch", f"--nodes={NODES}", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600")
    job_id = int(said.split()[-1])
    try:
        cluster.wait(job_id, ["RUNNING"])
    except AssertionError:
        pytest.fail("nodes never became free:\n" + cluster.call("squeue") + cluster.call("sinfo", "-R"))
    yield job_id
    cluster.cancel(job_id)


def test_a_run_is_watched_stopped_and_resumed_on_another_number_of_nodes(
    cluster: Cluster, full: int, recipe: Path, tmp_path: Path
) -> None:
    """A morning's work: it waits, it runs, it is stopped after the step at hand, and it ends on half of the nodes."""
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    settings = (f"stages.rl.steps={STEPS}", "stages.rl.checkpoint_every=1000", "stages.rl.refresh.share=0")
    job_id = launch(cluster, tmp_path, recipe, *settings)
    waiting = status(cluster, tmp_path)
    assert (waiting["state"], waiting["job_id"], waiting["attempt"]) == ("queued", job_id, None)
    assert waiting["reason"].endswith(("(Resources)", "(Priority)")), waiting
    assert "lrscale status" in cluster.lrscale("logs", "run", cwd=tmp_path).stderr  # nothing to show, and no traceback
    cluster.call("scancel", str(full))

    wait_until(lambda: metrics.is_file() and "\n" in metrics.read_text(), "a line of metrics")
    running = status(cluster, tmp_path)
    assert running["state"] == "running" and running["nodes"].startswith("node["), running
    assert running["progress"]["stage"] in ("traces", "projector_sft") and running["progress"]["step_s"] > 0
    assert "running" in cluster.lrscale("status", cwd=tmp_path).stdout

    wait_until(lambda: '"stage": "rl"' in metrics.read_text(), "an RL step")
    stopped = cluster.lrscale("stop", "run", "--json", cwd=tmp_path)
    ended = json.loads(stopped.stdout)
    assert (stopped.returncode, ended["state"]) == (0, "stopped"), (stopped.stderr, ended)
    saved, progress = ended["checkpoint"], ended["progress"]
    assert (saved["stage"], saved["step"]) == ("latent", progress["step"]) and saved["step"] < STEPS, ended
    assert (progress["arm"], progress["steps"]) == ("latent", STEPS) and progress["eta_s"] > 0
    assert cluster.job(job_id)["JobState"] == "COMPLETED"
    log = cluster.lrscale("logs", "run", "--rank", "1", cwd=tmp_path)
    assert "drained" in log.stdout or "saved" in log.stdout, log.stdout

    resumed = cluster.lrscale("resume", "run", "--nodes", "1", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    followed = cluster.lrscale("logs", "run", "--follow", cwd=tmp_path)
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if line["stage"] == "rl"]
    assert steps == list(range(1, STEPS + 1))
    assert "run: finished" in followed.stderr and f"latent {STEPS}/{STEPS}" in followed.stdout
    finished = status(cluster, tmp_path)
    assert (finished["state"], finished["attempt"]) == ("finished", 2)
    assert len(read_json(tmp_path / "runs" / "run" / "attempts" / "2" / "job.json")["nodes"]) == 1


def test_what_never_ran_ends_in_a_defined_state(
    cluster: Cluster, full: int, dead_controller: Cluster, recipe: Path, tmp_path: Path
) -> None:
    """Locks out a hang on a dead controller, `queued` for a cancelled job, and `queued` for one that nobody knows."""
    launch(cluster, tmp_path, recipe)
    started = time.monotonic()
    unknown = status(dead_controller, tmp_path, code=75)
    assert unknown["state"] == "queued" and "does not answer" in unknown["unanswered"]
    assert time.monotonic() - started < 60
    assert dead_controller.lrscale("stop", "run", cwd=tmp_path).returncode == 75

    cancelled = cluster.lrscale("stop", "run", "--now", cwd=tmp_path)
    assert cancelled.returncode == 0, cancelled.stderr
    found = status(cluster, tmp_path)
    assert (found["state"], found["reason"]) == ("cancelled", "cancelled before it started")
    assert cluster.lrscale("stop", "run", cwd=tmp_path).returncode == 7

    with (tmp_path / "runs" / "run" / "jobs.jsonl").open("a") as jobs:
        jobs.write(json.dumps({"job_id": 999_999, "submitted": time.time(), "nodes": 2, "sbatch": None}) + "\n")
    vanished = status(cluster, tmp_path)
    assert vanished["state"] == "vanished" and "999999" in vanished["reason"]
    (listed,) = json.loads(cluster.lrscale("list", "--json", cwd=tmp_path).stdout)
    assert listed["state"] == "vanished"


def test_a_node_without_the_model_is_left_out_by_the_requeue(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    """Locks out a job that comes back to the node on which it cannot run.

    The model lies on every node, but on one of them behind an empty mount: a local disk that was not filled.
    """
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    hidden = ["--nodelist=node1", "--nodes=1"]
    cluster.call("srun", *hidden, "mount", "-t", "tmpfs", "none", str(model))
    try:
        launch(cluster, tmp_path, recipe, "cluster.preflight=true", f"model.path={json.dumps(str(model))}")
        wait_until(lambda: status(cluster, tmp_path)["attempt"] == 2, "a second attempt")
        (line,) = (tmp_path / "runs" / "run" / "bad_nodes.txt").read_text().splitlines()
        assert line.startswith("node1 model files: ") and "no config.json" in line
        end = read_json(tmp_path / "runs" / "run" / "attempts" / "1" / "end.json")
        assert (end["state"], end["reason"]) == ("requeued", "the preflight found unfit: node1")
        assert read_json(tmp_path / "runs" / "run" / "attempts" / "2" / "job.json")["nodes"] == ["node2", "node3"]
        shown = cluster.lrscale("logs", "run", "--attempt", "1", "--errors", cwd=tmp_path).stdout
        assert "node1: " in shown and "help: " in shown
        cluster.lrscale("stop", "run", "--now", cwd=tmp_path)
    finally:
        cluster.call("srun", *hidden, "umount", str(model))


def test_a_rank_that_fails_is_named_with_its_node_and_words(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    """Locks out `failed` without a word, and the words of ranks that only lost their neighbour."""
    source = "import os\nif os.environ['RANK'] == '1':\n    raise KeyError('level')\n"
    source += "def reward(prompts, completions, **columns):\n    return [1.0 for _ in prompts]\n"
    (tmp_path / "reward.py").write_text(source)
    job_id = launch(cluster, tmp_path, recipe, f"reward={{kind: function, path: {tmp_path}/reward.py}}")
    cluster.wait(job_id)
    found = status(cluster, tmp_path)
    assert found["state"] == "failed" and found["failure"]["rank"] == 1, found
    assert "KeyError" in found["failure"]["reason"] and found["failure"]["node"] == "node2"
    shown = cluster.lrscale("logs", "run", "--errors", cwd=tmp_path)
    assert shown.returncode == 0 and shown.stdout.startswith("first failure: rank 1 on node2"), shown.stdout
    assert "KeyError: 'level'" in shown.stdout
    text = cluster.lrscale("status", "run", cwd=tmp_path).stdout
    assert "rank 1 on node2" in text and "lrscale logs" in text


def test_doctor_asks_the_real_cluster(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    done = cluster.lrscale("doctor", str(recipe), "--nodes", "8", "--json", cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["SLURM"]["state"] == "ok" and "4 of 4 nodes" in checks["SLURM"]["found"]
    assert checks["plan"]["state"] == "failed", checks["plan"]
    assert checks["markers"]["state"] == checks["reward"]["state"] == "ok"
