"""What SLURM's clients print, in the forms of several releases. The clients here print what real ones have printed.

squeue-22.05 and scontrol-22.05 were recorded (other jobs' entries and most keys cut away); in 23.02 counts, and from
23.11 on times as well, became {"set", "infinite", "number"}, and job_state a list: those files are the same two jobs
written so.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lrscale.launch import slurm

RECORDED = Path(__file__).parent / "slurm_output"
SUBMITTED = 1795529956


class Clients:
    """A folder on PATH with clients that print a file, or fail with words."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def print(self, client: str, text: str, *, code: int = 0, stream: int = 1) -> None:
        said = self.folder / f"{client}.said"
        said.write_text(text)
        path = self.folder / client
        path.write_text(f"#!/bin/sh\n/bin/cat '{said}' >&{stream}\nexit {code}\n")
        path.chmod(0o755)

    def fail(self, client: str, words: str) -> None:
        self.print(client, words, code=1, stream=2)


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    monkeypatch.setenv("PATH", str(tmp_path))
    made = Clients(tmp_path)
    made.fail("scontrol", "slurm_load_jobs error: Invalid job id specified\n")
    made.fail("sacct", "Slurm accounting storage is disabled\n")
    return made


@pytest.mark.parametrize("release", ["22.05", "23.02", "24.05"])
def test_jobs_are_read_in_the_json_of_every_release(clients: Clients, release: str) -> None:
    """Locks out a crash, or a job that is never seen to run, after the cluster's SLURM was updated."""
    clients.print("squeue", (RECORDED / f"squeue-{release}.json").read_text())
    running, waiting = slurm.find_job(1), slurm.find_job(2)
    assert running is not None and waiting is not None
    assert (running.state, running.reason, running.nodes, running.restarts) == ("RUNNING", "", "node[1-2]", 0)
    assert (running.submitted, running.started, running.over) == (SUBMITTED, SUBMITTED, False)
    assert (waiting.state, waiting.reason, waiting.nodes) == ("PENDING", "Resources", "")


def test_a_job_on_its_way_out_is_not_over(clients: Clients) -> None:
    """Locks out a requeued job that is called cancelled while its nodes are cleaned up (24.x tells two states)."""
    text = (RECORDED / "squeue-24.05.json").read_text().replace('"RUNNING"', '"CANCELLED", "COMPLETING"')
    clients.print("squeue", text)
    job = slurm.find_job(1)
    assert job is not None and (job.state, job.over) == ("COMPLETING", False)


def test_without_json_scontrol_is_asked(clients: Clients) -> None:
    """Locks out a SLURM without its JSON plugin, where squeue prints an error on stdout or an ordinary table."""
    clients.print("squeue", "JOBID PARTITION NAME\n")
    lines = (RECORDED / "scontrol-22.05.txt").read_text().splitlines(keepends=True)
    clients.print("scontrol", lines[0])
    running = slurm.find_job(1)
    assert running is not None and (running.state, running.nodes) == ("RUNNING", "node[1-2]")
    clients.print("scontrol", lines[1])
    waiting = slurm.find_job(2)
    assert waiting is not None
    assert (waiting.state, waiting.reason, waiting.nodes, waiting.ends) == ("PENDING", "Resources", "", None)


def test_the_accounting_knows_what_squeue_has_forgotten(clients: Clients) -> None:
    """Locks out `CANCELLED by 1000` as a state of its own, and the first start of a requeued job as the last word."""
    clients.fail("squeue", "slurm_load_jobs error: Invalid job id specified\n")
    clients.print(
        "sacct",
        "7|NODE_FAIL|node[1-2]|2026-11-24T10:00:00|2026-11-24T11:00:00\n"
        "7|CANCELLED by 1000|node[3-4]|2026-11-24T12:00:00|2026-11-24T13:00:00\n"
        "7.batch|CANCELLED|node3|2026-11-24T12:00:00|2026-11-24T13:00:00\n",
    )
    job = slurm.find_job(7)
    assert job is not None and (job.state, job.nodes, job.over) == ("CANCELLED", "node[3-4]", True)


def test_a_job_that_nobody_knows_is_none(clients: Clients) -> None:
    clients.fail("squeue", "slurm_load_jobs error: Invalid job id specified\n")
    assert slurm.find_job(7) is None


@pytest.mark.parametrize(
    "words",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
        "squeue: error: Connection refused\nslurm_load_jobs error: Socket timed out on send/recv operation\n",
    ],
)
def test_a_controller_that_does_not_answer_is_no_unknown_job(clients: Clients, words: str) -> None:
    """Locks out `vanished` for every run of a cluster whose controller is restarted."""
    clients.fail("squeue", words)
    with pytest.raises(slurm.SlurmUnreachable):
        slurm.find_job(1)


def test_a_dead_controller_in_json_is_no_empty_queue(clients: Clients) -> None:
    """Locks out a second wait: squeue --json of 22.05 exits with 0 after its time-out, and says so in `errors` only."""
    error = '{"description": "Failed while looking for jobs", "error_number": -1, "source": "slurm_load_jobs"}'
    clients.print("squeue", f'{{"errors": [{error}], "jobs": []}}')
    with pytest.raises(slurm.SlurmUnreachable):
        slurm.find_job(1)


def test_a_machine_without_slurm_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.NoSlurm):
        slurm.find_job(1)
