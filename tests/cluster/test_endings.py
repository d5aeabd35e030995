"""slurm/train.sh under a real SLURM: every way in which an attempt can end, and what the script makes of it.

The ranks are stood in for by a line of shell, so that a job takes a second; test_training.py has the real ones.
"""

from __future__ import annotations

import pytest

from tests.cluster.conftest import Run, read_json
from tests.cluster.scripted import DRAINS, RUNS, SAVES, Scripted, ready

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unattended(scripted: Scripted, late: Run) -> dict[str, Run]:
    """Jobs that need nobody, side by side: a requeue takes SLURM six seconds.

    `late` takes SLURM more than a minute, and is looked at in test_training.py.
    """
    bad = '[[ $SLURM_PROCID == 0 ]] || echo "$SLURMD_NODENAME ECC errors" >>$R/bad_nodes.txt; '
    fails = "sleep 1; exit 6"
    return {
        "crash": scripted.start("crash", f"[[ $N == 2 ]] || {{ {SAVES} }}; {fails}"),
        "budget": scripted.start("budget", f"{SAVES} {fails}", "cluster.max_restarts=1"),
        "bad-node": scripted.start("bad-node", f"[[ $N == 1 ]] || {{ {RUNS}; }}; {SAVES} {bad} {fails}"),
        "refused": scripted.start("refused", f"{SAVES} exit 3"),
        "nodes": scripted.start("nodes", "exit 0", nodes=1),
    }


def test_a_crash_is_retried_only_while_something_is_saved(unattended: dict[str, Run]) -> None:
    """Locks out requeue loops that burn an allocation: attempt 1 saves and crashes, attempt 2 only crashes."""
    run = unattended["crash"]
    first, second = run.end(1), run.end(2)
    assert first["state"] == "requeued" and "a rank failed (exit code 6)" in first["reason"]
    assert second["state"] == "failed" and "made no checkpoint" in second["reason"]
    assert run.cluster.wait(run.job_id) == "FAILED"


def test_a_recipe_that_is_refused_is_not_tried_again(unattended: dict[str, Run]) -> None:
    run = unattended["refused"]
    ended = run.end()
    assert ended["state"] == "failed" and "exit code 3" in ended["reason"] and not run.attempt(2).exists()


def test_the_budget_of_restarts_is_kept(unattended: dict[str, Run]) -> None:
    """Locks out a job that comes back for ever, though each attempt saves a little."""
    run = unattended["budget"]
    assert run.end(1)["state"] == "requeued", run.end(1)
    assert run.end(2)["state"] == "stopped" and "it was 1 times already" in run.end(2)["reason"]


def test_a_drain_that_saves_nothing_stops(scripted: Scripted) -> None:
    """Locks out a time limit that is too short for one step, asked for again and again."""
    run = scripted.start("idle", f"touch $A/ready; {DRAINS}")
    run.cluster.call("scancel", "--signal=USR2", "--batch", str(ready(run)))
    assert run.end()["state"] == "stopped" and "made no checkpoint" in run.end()["reason"]


def test_a_stop_that_was_asked_for_is_no_reason_to_come_back(scripted: Scripted) -> None:
    run = scripted.start("stop", f"{SAVES} touch $A/ready; {DRAINS}")
    ready(run)
    (run.attempt() / "drain").write_text("stop\n")
    assert run.end()["state"] == "stopped" and "on request" in run.end()["reason"]


@pytest.mark.parametrize("how", [["scancel"], ["scancel", "--signal=TERM", "--full"]])
def test_a_cancelled_job_says_so(scripted: Scripted, how: list[str]) -> None:
    """Locks out a cancelled job that goes back into the queue because its ranks ended with an error."""
    run = scripted.start(f"cancel-{len(how)}", f"{SAVES} {RUNS}")
    run.cluster.call(*how, str(ready(run)))
    assert run.end()["state"] == "cancelled", run.logs()
    assert run.cluster.wait(run.job_id) in ("CANCELLED", "FAILED") and not run.attempt(2).exists()


def test_ranks_that_were_interrupted_end_the_job(scripted: Scripted) -> None:
    run = scripted.start("interrupted", RUNS)
    run.cluster.interrupt_ranks(ready(run))
    assert run.end()["state"] == "cancelled", run.logs()


def test_a_job_that_is_thrown_off_its_nodes_comes_back_until_nothing_comes_of_it(scripted: Scripted) -> None:
    """SLURM requeues by itself, after a lost node and when it is told to; each attempt still says what became of it.

    Locks out nodes that are lost, or a queue that preempts, faster than a first checkpoint comes, for ever.
    """
    run = scripted.start("thrown-off", RUNS, "cluster.exclude=[node3, node4]")
    node = run.cluster.nodes_of(ready(run))[1]
    run.cluster.lose(node)
    assert run.end(1)["state"] == "requeued" and "one failed" in run.end(1)["reason"]
    run.cluster.call("scontrol", "requeue", str(ready(run, 2)))
    assert run.end(2)["state"] == "requeued"
    assert run.end(3) == run.end(3) | {"state": "stopped", "reason": "the last two attempts made no checkpoint"}


def test_bad_nodes_are_left_out_after_a_requeue(unattended: dict[str, Run]) -> None:
    """Locks out a job that is given the node with the broken GPU again and again."""
    run = unattended["bad-node"]
    assert run.end(1)["state"] == "requeued", run.end(1)
    name = (run.path / "bad_nodes.txt").read_text().split()[0]
    job_id = ready(run, 2)
    assert run.cluster.job(job_id)["ExcNodeList"] == name and name not in run.cluster.nodes_of(job_id)
    run.cluster.cancel(job_id)


def test_another_number_of_nodes_is_refused(unattended: dict[str, Run]) -> None:
    """Locks out a launcher that waits for nodes that never come."""
    run = unattended["nodes"]
    assert "sbatch --nodes 2" in run.end()["reason"] and run.end()["state"] == "failed"


def test_the_first_role_to_end_ends_the_job_by_name(scripted: Scripted) -> None:
    """Locks out a trainer that waits for rollouts of nodes that are long dead."""
    roles = "[{name: judge, nodes: 1, command: sleep 600}, {name: rollout, nodes: 1, command: 'echo bye; exit 7'}]"
    run = scripted.start("roles", RUNS, f"cluster.split.roles={roles}")
    assert run.end()["state"] == "failed" and "the role rollout ended" in run.end()["reason"]
    assert "bye\n" in (run.attempt() / "role-rollout.log").read_text()
    assert "the role rollout ended first (exit code 7)" in (run.attempt() / "slurm.log").read_text()
    assert len(read_json(run.attempt() / "job.json")["nodes"]) == 4


@pytest.mark.parametrize("heterogeneous", ["false", "true"])
def test_roles_have_nodes_of_their_own(scripted: Scripted, heterogeneous: str) -> None:
    """Locks out a role on the trainer's nodes, in one allocation as in a heterogeneous job; the trainer ends it all."""
    command = "srun_node=$SLURMD_NODENAME; echo $srun_node >$LRSCALE_RUN_DIR/role-$SLURM_PROCID; sleep 600"
    trains = "echo $SLURMD_NODENAME >$R/train-$SLURM_PROCID; until [[ -e $R/role-1 ]]; do sleep 0.1; done; touch $R/done.json"
    roles = f"{{heterogeneous: {heterogeneous}, roles: [{{name: rollout, nodes: 2, command: '{command}'}}]}}"
    run = scripted.start(f"nodes-{heterogeneous}", trains, f"cluster.split={roles}")
    assert run.end()["state"] == "finished", run.logs()
    placed = {name: (run.path / name).read_text() for name in ("train-0", "train-1", "role-0", "role-1")}
    assert len(set(placed.values())) == 4, placed
