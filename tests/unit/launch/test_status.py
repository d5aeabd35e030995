"""What became of a run: every state, from the marks in its folder and from SLURM's words."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from lrscale.config.diagnosis import Check
from lrscale.launch import slurm
from lrscale.launch.drain import STOP, stop
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.overview import HEADER, described, row, table
from lrscale.launch.status import exit_code_of, status_of
from tests.unit.launch.run_folder import NOW, KnownJob, RunFolder, SilentCluster


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def job(state: str, reason: str = "", **more: Any) -> slurm.Job:
    return slurm.Job(7, state, reason, **more)


def test_a_run_that_was_never_submitted_has_not_started(folder: RunFolder) -> None:
    assert status_of(folder.path, KnownJob()).state == "not started"


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        ("Priority", "Priority", "other jobs come first (Priority)"),
        ("Resources", "Resources", "nodes have to become free"),
        ("limit", "QOSMaxGRESPerUser", "a limit of your account or QOS"),
        ("down", "ReqNodeNotAvail,_UnavailableNodes:node2", "down or reserved (ReqNodeNotAvail"),
        ("unknown", "SomethingNew", "SomethingNew"),
    ],
)
def test_a_queued_run_says_why_it_waits(folder: RunFolder, state: str, reason: str, words: str) -> None:
    folder.submitted(7)
    found = status_of(folder.path, KnownJob(job("PENDING", reason, submitted=NOW, started=NOW + 3600)))
    assert found.state == "queued" and words in found.reason
    assert "expects to start it in 1 h 00 min" in described(found, now=NOW)


def test_a_running_run_tells_step_reward_pace_and_time_to_go(folder: RunFolder) -> None:
    """Locks out a time to go that forgets the arms still to come."""
    folder.submitted(7)
    (folder.began(1, 7) / "rank0.log").touch()
    folder.metrics(
        {"stage": "projector_sft", "arm": None, "step": 30, "loss": 1.0, "step_s": 0.1},
        *({"stage": "rl", "arm": "latent", "step": n, "reward_mean": n / 10, "step_s": 4.0} for n in (1, 2, 3)),
        {"stage": "audit", "arm": "latent", "step": 3, "drift": 0.0},
    )
    folder.write("checkpoints/projector_sft/step-30/manifest.json", {})
    folder.write("checkpoints/latent/.tmp-step-3/manifest.json", {})
    found = status_of(folder.path, KnownJob(job("RUNNING", nodes="node[1-2]", started=NOW - 60, ends=NOW + 7200)))
    assert (found.state, found.reason) == ("running", "")
    assert found.progress is not None and found.checkpoint is not None
    progress = found.progress
    assert (progress.stage, progress.arm, progress.step, progress.steps) == ("rl", "latent", 3, 20)
    assert (progress.reward, progress.step_s, progress.eta_s) == (0.3, 4.0, (17 + 20) * 4.0)
    assert (found.checkpoint.stage, found.checkpoint.step) == ("projector_sft", 30)
    text = described(found, now=NOW)
    assert "rl latent 3/20" in text and "node[1-2]" in text and "time limit in 2 h 00 min" in text
    assert "rl latent 3/20" in row(found, now=NOW)


def test_a_job_that_begins_says_what_it_is_at(folder: RunFolder) -> None:
    """Locks out minutes of `running` without a word while nodes are looked at and models loaded."""
    folder.submitted(7)
    folder.began(1, 7)
    cluster = KnownJob(job("RUNNING"))
    assert "preflight" in status_of(folder.path, cluster).reason
    folder.write("attempts/1/preflight.json", [])
    assert status_of(folder.path, cluster).reason == "the ranks are starting"


def test_a_failed_preflight_says_where_and_what_to_do(folder: RunFolder) -> None:
    folder.submitted(7)
    check = Check("ECC", "failed", "GPU 3: 2 errors", "none", "report the GPU", node="node2", blames_node=True)
    end = {"state": "failed", "reason": "the preflight failed", "ended": NOW}
    folder.began(1, 7, end=end, preflight=[check.to_json(), Check("GPUs", "ok", "8").to_json()])
    found = status_of(folder.path, KnownJob())
    assert found.preflight == (check,) and "GPUs" not in described(found)
    assert "node2: GPU 3: 2 errors" in described(found) and "help: report the GPU" in described(found)


def test_nodes_that_are_left_out_are_told(folder: RunFolder) -> None:
    """Locks out a job that waits for ever on a small cluster, and nobody remembers why."""
    folder.submitted(7)
    folder.write("bad_nodes.txt", "node2 ECC: GPU 3: 2 errors; needed none\n\n")
    found = status_of(folder.path, KnownJob(job("PENDING", "ReqNodeNotAvail,_UnavailableNodes:node2")))
    assert found.unfit == {"node2": "ECC: GPU 3: 2 errors; needed none"}
    assert "left out: node2 (ECC: GPU 3: 2 errors)" in described(found)


def test_half_a_line_at_the_end_of_the_metrics_is_no_step(folder: RunFolder) -> None:
    folder.metrics({"stage": "rl", "arm": "latent", "step": 1, "reward_mean": 0.5, "step_s": 1.0})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "arm": "latent", "st')
    found = status_of(folder.path, KnownJob())
    assert found.progress is not None and found.progress.step == 1


def test_a_drain_that_was_asked_for_is_told(folder: RunFolder) -> None:
    folder.submitted(7)
    (folder.began(1, 7) / "drain").touch()
    assert status_of(folder.path, KnownJob(job("RUNNING"))).state == "draining"


def test_a_requeued_job_waits_and_says_what_ended_it(folder: RunFolder) -> None:
    """Locks out `queued`, as if nothing had run yet, and the drain of the former attempt as one of the next."""
    folder.submitted(7)
    (
        folder.began(1, 7, end={"state": "requeued", "reason": "saved when time was short", "ended": NOW}) / "drain"
    ).touch()
    waiting = status_of(folder.path, KnownJob(job("PENDING", "BeginTime", restarts=1)))
    assert waiting.state == "waiting for requeue"
    assert "saved when time was short" in waiting.reason and "start time" in waiting.reason
    started = status_of(folder.path, KnownJob(job("RUNNING", restarts=1)))
    assert (started.state, started.reason) == ("running", "the job is starting")


def test_a_node_failure_before_any_word_is_a_requeue(folder: RunFolder) -> None:
    folder.submitted(7)
    folder.began(1, 7)
    assert status_of(folder.path, KnownJob(job("PENDING", "BeginTime", restarts=1))).state == "waiting for requeue"


@pytest.mark.parametrize("state", ["finished", "failed", "cancelled", "stopped"])
def test_last_words_settle_it_without_slurm(folder: RunFolder, state: str) -> None:
    """Locks out a state that is lost a week later, when SLURM has forgotten the job."""
    folder.submitted(7)
    folder.began(1, 7, end={"state": state, "reason": "because", "ended": NOW})
    cluster = KnownJob()
    found = status_of(folder.path, cluster)
    assert (found.state, found.since, cluster.asked) == (state, NOW, 0)
    assert found.reason == ("" if state == "finished" else "because")


def test_last_words_of_a_former_job_are_not_those_of_the_new_one(folder: RunFolder) -> None:
    """Locks out `failed` for a run that was resumed and waits in the queue."""
    folder.submitted(6, 7)
    folder.began(
        1, 6, end={"state": "failed", "reason": "a rank failed", "ended": NOW}, exit={"code": 6, "reason": "x"}
    )
    found = status_of(folder.path, KnownJob(job("PENDING", "Priority")))
    assert (found.state, found.job_id, found.failure) == ("queued", 7, None)


def test_the_rank_that_failed_first_is_named_with_its_node(folder: RunFolder) -> None:
    """Locks out the main rank's `the others are out of reach` as the reason of a failure."""
    folder.submitted(7)
    folder.began(
        1,
        7,
        end={"state": "failed", "reason": "a rank failed (exit code 6)", "ended": NOW},
        exit={"code": 6, "reason": "RuntimeError: the other ranks are out of reach", "ended": NOW + 3},
        rank3_exit={"code": 6, "reason": "KeyError: 'level'", "ended": NOW + 1},
        rank2_exit={"code": 130, "reason": "interrupted", "ended": NOW},
    )
    found = status_of(folder.path, KnownJob())
    assert found.failure is not None
    assert (found.failure.rank, found.failure.node, found.failure.reason) == (3, "node2", "KeyError: 'level'")
    assert "rank 3 on node2: KeyError: 'level'" in described(found, now=NOW)


def test_a_rank_that_was_killed_is_named_by_its_launcher(folder: RunFolder) -> None:
    """Locks out `a rank failed` alone: who is killed leaves no exit.json."""
    folder.submitted(7)
    end = {"state": "failed", "reason": "a rank failed (exit code 6): see rank0.log", "ended": NOW}
    folder.began(1, 7, end=end)
    folder.write("attempts/1/node-1.log", "error: rank 3 was killed by SIGKILL; the other ranks were ended\n")
    folder.write("attempts/1/slurm.log", "srun: error: node2: task 1: Exited with exit code 6\n")
    found = status_of(folder.path, KnownJob())
    assert "rank 3 was killed by SIGKILL" in described(found) and "rank 3 was killed" in row(found)[-1]


@pytest.mark.parametrize(
    ("state", "expected", "words"),
    [
        ("CANCELLED", "cancelled", "cancelled"),
        ("TIMEOUT", "failed", "its time limit was reached (TIMEOUT)"),
        ("NODE_FAIL", "failed", "a node failed"),
        ("PREEMPTED", "failed", "higher priority"),
        ("OUT_OF_MEMORY", "failed", "out of host memory"),
        ("COMPLETED", "failed", "without a word"),
    ],
)
def test_a_job_that_ended_without_last_words_ends_in_a_defined_state(
    folder: RunFolder, state: str, expected: str, words: str
) -> None:
    folder.submitted(7)
    folder.began(1, 7)
    found = status_of(folder.path, KnownJob(job(state)))
    assert found.state == expected and words in found.reason


def test_a_job_that_nobody_knows_has_vanished(folder: RunFolder) -> None:
    """Locks out `running` for ever, for a job that was killed together with its batch script."""
    folder.submitted(7)
    folder.began(1, 7)
    found = status_of(folder.path, KnownJob())
    assert found.state == "vanished" and "job 7" in found.reason


def test_a_silent_controller_leaves_what_the_folder_tells(folder: RunFolder) -> None:
    folder.submitted(7)
    assert status_of(folder.path, SilentCluster()).state == "queued"
    folder.began(1, 7)
    found = status_of(folder.path, SilentCluster())
    assert (found.state, found.nodes) == ("running", "node1,node2")
    assert "does not answer" in found.unanswered and "does not answer" in described(found)
    assert exit_code_of([found]) == ExitCode.TRY_LATER
    folder.write("done.json", {"finished": NOW})
    settled = status_of(folder.path, SilentCluster())
    assert (settled.state, exit_code_of([settled])) == ("finished", 0)


def test_a_job_submitted_by_hand_is_known_by_its_attempt(folder: RunFolder) -> None:
    folder.began(1, 7)
    found = status_of(folder.path, KnownJob(job("RUNNING")))
    assert (found.state, found.job_id) == ("running", 7)


def test_runs_without_slurm_are_told_by_lock_and_exit(folder: RunFolder) -> None:
    """Locks out a local run that is called vanished while it runs, or running after kill -9."""
    folder.write("lock", {"pid": 123, "host": "laptop"})
    folder.began(1)
    assert status_of(folder.path).state == "vanished"
    with (folder.path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        running = status_of(folder.path)
    assert running.state == "running" and "process 123 on laptop" in running.reason
    folder.write("lock", "")
    folder.write("attempts/1/exit.json", {"code": 130, "reason": "interrupted", "ended": NOW})
    assert (status_of(folder.path).state, status_of(folder.path).reason) == ("stopped", "interrupted")
    folder.write("attempts/1/exit.json", {"code": 6, "reason": "OSError: full", "ended": NOW})
    assert (status_of(folder.path).state, status_of(folder.path).reason) == ("failed", "OSError: full")


def test_a_run_that_went_on_without_slurm_is_told_by_that(folder: RunFolder) -> None:
    """Locks out the state of last week's job for a run that was finished on a workstation."""
    folder.submitted(7)
    folder.began(1, 7, end={"state": "stopped", "reason": "on request", "ended": NOW})
    folder.began(2, exit={"code": 6, "reason": "OSError: full", "started": NOW + 60, "ended": NOW + 90})
    assert status_of(folder.path, KnownJob()).reason == "OSError: full"
    folder.write("attempts/2/exit.json", {"code": 6, "reason": "x", "started": NOW - 500, "ended": NOW - 400})
    assert status_of(folder.path, KnownJob(job("PENDING"))).state == "queued"


def test_a_folder_that_a_batch_script_is_just_making_is_its_jobs(folder: RunFolder) -> None:
    """Locks out `lrscale logs --follow` that leaves a resumed run while its job is starting."""
    folder.submitted(7)
    new = folder.path / "attempts" / "1"
    new.mkdir(parents=True)
    (new / ".job.tmp").touch()
    found = status_of(folder.path, KnownJob(job("RUNNING")))
    assert (found.state, found.job_id) == ("running", 7)


def test_every_status_is_json(folder: RunFolder) -> None:
    folder.submitted(7)
    folder.began(1, 7, exit={"code": 6, "reason": "x", "ended": NOW})
    folder.metrics({"stage": "traces", "step": 1, "step_s": 1.0})
    value = json.loads(json.dumps(status_of(folder.path, KnownJob(job("FAILED"))).to_json()))
    assert (value["state"], value["job_id"], value["failure"]["rank"]) == ("failed", 7, 0)
    assert value["path"] == str(folder.path)


def test_a_table_shows_no_empty_columns(folder: RunFolder) -> None:
    header, rows = table([status_of(folder.path, KnownJob())], now=NOW)
    assert set(header) < set(HEADER) and len(rows[0]) == len(header) and "job" not in header


def test_a_stop_asks_for_a_drain_that_is_not_requeued(folder: RunFolder) -> None:
    """Locks out a stopped run that SLURM starts again."""
    folder.submitted(7)
    attempt = folder.began(1, 7)
    stop(status_of(folder.path, KnownJob(job("RUNNING"))), now=False)
    assert (attempt / "drain").read_text().strip() == STOP


def test_what_does_not_run_is_not_stopped(folder: RunFolder) -> None:
    with pytest.raises(LaunchError) as caught:
        stop(status_of(folder.path, KnownJob()), now=False)
    assert caught.value.code == ExitCode.NOT_FOUND


def test_without_an_answer_nothing_is_cancelled_but_a_drain_goes_through_the_folder(folder: RunFolder) -> None:
    folder.submitted(7)
    attempt = folder.began(1, 7)
    silent = status_of(folder.path, SilentCluster())
    with pytest.raises(LaunchError) as caught:
        stop(silent, now=True)
    assert caught.value.code == ExitCode.TRY_LATER
    stop(silent, now=False)
    assert (attempt / "drain").exists()
