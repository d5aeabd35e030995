"""A real SLURM on this machine: four nodes of eight pretended GPUs, one for the whole session."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.distributed.ranks import ROOT

if TYPE_CHECKING:
    from tests.cluster.scripted import Scripted

HERE = Path(__file__).parent
NODES, GPUS = 4, 8
PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL")
PATIENCE_S = 240.0
"""A job trains for about 20 s here; other jobs run beside it on two cores."""


@dataclass(frozen=True)
class Cluster:
    """The cluster, and what tests ask of it."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are to find it; settings of the user's own do not reach them."""
        return os.environ | {
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "XDG_CONFIG_HOME": str(self.root / "config"),
        }

    def call(self, *command: str, check: bool = True) -> str:
        """A SLURM client's stdout."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, (command, done.stdout, done.stderr)
        return done.stdout

    def lrscale(self, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """`lrscale arguments`, to its end."""
        command = [sys.executable, "-m", "lrscale", *arguments]
        env = self.environment | environment
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def job(self, job_id: int) -> dict[str, str]:
        """`scontrol show job` by key."""
        text = self.call("scontrol", "-o", "show", "job", str(job_id))
        return dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", text))

    def nodes_of(self, job_id: int) -> list[str]:
        """Names of the nodes that a job has."""
        return self.call("scontrol", "show", "hostnames", self.job(job_id)["NodeList"]).split()

    def interrupt_ranks(self, job_id: int) -> None:
        """SIGTERM to the first step of a job: asked again while one of its nodes has yet to start its part of it."""
        command = ["scancel", "--signal=TERM", f"{job_id}.0"]

        def heard() -> bool:
            return subprocess.run(command, env=self.environment, capture_output=True, timeout=60).returncode == 0

        wait_until(heard, f"all nodes run the first step of job {job_id}", timeout_s=30)

    def cancel(self, job_id: int) -> None:
        """Cancels a job for good: one that its script is just putting back into the queue would come back."""

        def over() -> bool:
            self.call("scancel", str(job_id), check=False)
            return self.job(job_id)["JobState"] in OVER

        wait_until(over, f"the end of job {job_id}")

    def lose(self, node: str) -> None:
        """Takes a node away from whatever runs on it, and gives it back: by itself it would stay away for minutes."""
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        wait_until(lambda: self.job_count(node) == 0, f"no job on {node}")
        self.call("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # or it is back already

    def job_count(self, node: str) -> int:
        """Jobs that run on a node."""
        return len(self.call("squeue", "-h", "-o", "%i", "-t", "RUNNING,COMPLETING", "-w", node).split())

    def wait(self, job_id: int, states: Sequence[str] = OVER, *, timeout_s: float = PATIENCE_S) -> str:
        """Until the job is in one of the states; which one."""
        wait_until(lambda: self.job(job_id)["JobState"] in states, f"job {job_id} in {states}", timeout_s)
        return self.job(job_id)["JobState"]


def wait_until(true: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.2)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Up in a second; ends with all of its processes when this session ends, however it ends."""
    missing = [package for command, package in PACKAGES.items() if shutil.which(command) is None]
    if missing:
        pytest.skip(f"SLURM is not installed: apt-get install --no-install-recommends {' '.join(missing)}")
    if (
        os.geteuid()
        or subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode
    ):
        pytest.skip("a SLURM for tests needs root and the right to make namespaces (unshare)")
    root = Path(tempfile.mkdtemp(prefix="lrscale-slurm-"))
    root.chmod(0o755)
    command = [str(HERE / "slurm" / "cluster.sh"), str(root), str(NODES), str(GPUS), str(free_ports(NODES + 1))]
    try:
        with (
            (root / "start.log").open("w") as errors,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            assert process.stdin is not None and process.stdout is not None
            said = [process.stdout.readline(), process.stdout.readline()]
            if said[-1] != "ready\n":
                process.stdin.close()
                pytest.fail(f"SLURM did not start: {''.join(said)}{(root / 'start.log').read_text()}")
            yield Cluster(root)
            process.stdin.close()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def dead_controller(cluster: Cluster, tmp_path: Path) -> Cluster:
    """The cluster as it looks while its controller is down: a port at which nobody answers."""
    text = (cluster.root / "slurm.conf").read_text()
    (tmp_path / "slurm.conf").write_text(re.sub(r"SlurmctldPort=\d+", f"SlurmctldPort={free_ports(1)}", text))
    return Cluster(tmp_path)


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody listens on."""
    for first in range(17_000 + os.getpid() % 1000 * 10, 32_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as bound:
                    bound.bind(("", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


RECIPE = """
name: tiny
model: {device: cpu}
projector: {kind: normalised}
task: {kind: flawed_stories, world: ring, events: [4, 4], prompt_style: brief, train_prompts: 24, eval_prompts: 6}
rollout: {max_new_tokens: 72}
parallel: {kind: zero3, ranks_per_node: 2, threads: 1}
checkpoints: {keep_last: 1}
cluster: {preflight: false, time_limit: "60", drain_s: 60, cpus_per_rank: 2, memory: 1G}
report: {html: false}
stages:
  run: [traces, projector_sft, rl]
  traces: {prompts: 8, samples_per_prompt: 2, prompts_per_batch: 4, heldout_share: 0.3}
  projector_sft: {batch_rows: 4, max_steps: 2, checkpoint_every: 10}
  rl:
    steps: 3
    prompts_per_step: 4
    group_size: 2
    learning_rate: 1e-4
    checkpoint_every: 10
    audit_every: 0
    save_rollouts_every: 0
    refresh: {every_steps: 2, share: 0.5}
  evaluate: {prompts: 6}
"""
"""All of training in half a minute; checkpoints come at ends of stages, and when a drain asks for one."""


@dataclass(frozen=True)
class Run:
    """A run directory that jobs of the cluster work on."""

    cluster: Cluster
    path: Path

    @property
    def jobs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "jobs.jsonl").read_text().splitlines()]

    @property
    def job_id(self) -> int:
        return int(self.jobs[-1]["job_id"])

    def attempt(self, number: int = 1) -> Path:
        return self.path / "attempts" / str(number)

    def metrics(self) -> list[dict[str, Any]]:
        """What was measured, without how long it took."""
        try:
            lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError):  # a line is being written
            return []
        clocks = ("_s", "minutes", "time", "seconds")
        return [{key: value for key, value in line.items() if not key.endswith(clocks)} for line in lines]

    def steps(self, stage: str) -> list[int]:
        return [line["step"] for line in self.metrics() if line["stage"] == stage]

    def end(self, number: int = 1) -> dict[str, Any]:
        """How an attempt ended; waits for it."""
        path = self.attempt(number) / "end.json"
        wait_until(path.is_file, f"{path}: {self.logs(number)}")
        return read_json(path)

    def logs(self, number: int = 1) -> str:
        """For messages of failing tests."""
        paths = [*self.path.glob("slurm-*.log"), *sorted(self.attempt(number).glob("*.log"))]
        return "".join(f"\n--- {path}\n{path.read_text()[-2000:]}" for path in paths)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def scripted(cluster: Cluster, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    from tests.cluster.scripted import Scripted

    return Scripted(cluster, tmp_path_factory.mktemp("scripted"), recipe)


@pytest.fixture(scope="session")
def late(scripted: Scripted) -> Run:
    """Saves once, and is then deaf until its time limit."""
    from tests.cluster.scripted import OTHERS, RUNS, SAVES

    return scripted.start("late", f"{SAVES} {RUNS}", "cluster.time_limit='1'", "cluster.drain_s=10", OTHERS)
