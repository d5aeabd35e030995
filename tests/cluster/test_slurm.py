"""What lrscale.launch.slurm asks a real SLURM, and what becomes of it when SLURM does not answer."""

from __future__ import annotations

import pytest

from lrscale.launch import slurm
from lrscale.launch.errors import ExitCode, LaunchError
from tests.cluster.conftest import GPUS, NODES, Cluster, wait_until


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster


def test_a_job_is_found_wherever_slurm_still_knows_it(here: Cluster) -> None:
    """Locks out a status that knows running jobs only, and old releases of squeue that list every job."""
    job_id = slurm.submit(["sbatch", "--nodes=2", "--time=10", "--output=/dev/null", "--wrap", "sleep 300"])
    here.wait(job_id, ["RUNNING"])
    job = slurm.find_job(job_id)
    assert job is not None and (job.state, job.nodes, job.restarts, job.over) == ("RUNNING", job.nodes, 0, False)
    assert job.started and job.submitted and job.nodes.startswith("node[")
    assert slurm._by_scontrol(job_id) == job
    slurm.cancel(job_id)
    here.wait(job_id)
    ended = slurm.find_job(job_id)
    wait_until(lambda: slurm._by_sacct(job_id), "the job in the accounting")  # written by a thread of its own
    accounted = slurm._by_sacct(job_id)
    assert ended is not None and (ended.state, ended.over) == ("CANCELLED", True)
    assert accounted is not None and (accounted.state, accounted.nodes) == ("CANCELLED", job.nodes)
    assert slurm.find_job(job_id + 1000) is None


def test_a_partition_tells_its_limits(here: Cluster) -> None:
    (main,) = slurm.partitions().values()
    assert (main.name, main.default, main.up, main.nodes, main.gpus_per_node) == ("main", True, True, NODES, GPUS)
    assert (main.cpus_per_node, main.memory_mib, main.max_time_s, main.max_nodes) == (16, 6000, None, None)


@pytest.mark.parametrize("option", ["--nodes=40", "--partition=none", "--time=1:x"])
def test_a_refusal_is_in_the_words_of_slurm(here: Cluster, option: str) -> None:
    for call in (slurm.submit, slurm.test_only):
        with pytest.raises(LaunchError) as caught:
            call(["sbatch", option, "--wrap", "true"])
        assert caught.value.code == ExitCode.REFUSED_BY_SLURM and "sbatch:" not in str(caught.value)


def test_a_dead_controller_is_said_to_be_one(dead_controller: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks out a client that hangs for minutes, and a job that is called unknown because nobody answered."""
    monkeypatch.setenv("SLURM_CONF", dead_controller.environment["SLURM_CONF"])
    monkeypatch.setattr(slurm, "TIMEOUT_S", 2.0)
    monkeypatch.setattr(slurm, "_SUBMIT_TIMEOUT_S", 2.0)
    for call in (slurm.partitions, lambda: slurm.find_job(10**6), lambda: slurm.submit(["sbatch", "--wrap", "true"])):
        with pytest.raises(slurm.SlurmUnreachable) as caught:
            call()
        assert caught.value.code == ExitCode.TRY_LATER


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129_600), ("1-0:30", 88_200), ("2-00:00:05", 172_805)],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    """Locks out `1:30` as an hour and a half."""
    assert slurm.duration_s(text) == seconds
