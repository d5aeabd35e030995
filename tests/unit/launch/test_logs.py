"""Logs of a start, and the errors in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.logged_errors import find_errors
from lrscale.launch.logs import (
    choose_attempt,
    early_logs,
    ends_of,
    follow,
    last_lines,
    log_files,
    story_files,
)
from tests.unit.launch.run_folder import RunFolder

TRACE = """\
2026-11-24 14:11:42,750 INFO Traceback (most recent call last):
  File "rl.py", line 3, in sample
    raise KeyError("level")
KeyError: 'level' of row {row}

2026-11-24 14:11:43,000 INFO going on
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.began(1)
    made.began(2)
    return made


def test_logs_come_in_the_order_in_which_one_reads_them(folder: RunFolder) -> None:
    """Locks out rank10 before rank2."""
    for name in ("rank10", "rank2", "rank0", "node-1", "slurm"):
        folder.write(f"attempts/2/{name}.log", "x\n")
    attempt = choose_attempt(folder.path)
    names = [path.name for path in log_files(attempt)]
    assert names == ["slurm.log", "node-1.log", "rank0.log", "rank2.log", "rank10.log"]
    assert [path.name for path in story_files(attempt)] == ["slurm.log", "rank0.log"]
    assert [path.name for path in log_files(attempt, 10)] == ["rank10.log"]


def test_a_batch_script_that_never_came_to_an_attempt_is_heard(folder: RunFolder) -> None:
    """Locks out `no errors` for a job whose script ended in its first lines."""
    folder.write("slurm-6.log", "")
    folder.write("slurm-7.log", "job.env: line 3: syntax error\n")
    assert [path.name for path in early_logs(folder.path)] == ["slurm-7.log"]
    folder.write("attempts/2/job.json", {"job_id": 7})
    folder.write("attempts/2/slurm.log", "x\n")
    assert [path.name for path in log_files(choose_attempt(folder.path))] == ["slurm-7.log", "slurm.log"]


@pytest.mark.parametrize(("attempt", "rank"), [(5, None), (None, 99)])
def test_what_is_not_there_is_said_with_what_is(folder: RunFolder, attempt: int | None, rank: int | None) -> None:
    folder.write("attempts/2/rank0.log", "x\n")
    with pytest.raises(LaunchError) as caught:
        log_files(choose_attempt(folder.path, attempt), rank)
    assert caught.value.code == ExitCode.NOT_FOUND and "help" in str(caught.value)


def test_an_error_that_many_ranks_repeat_is_told_once_and_echoes_last(folder: RunFolder) -> None:
    """Locks out 63 tracebacks of ranks that lost rank 5, in front of rank 5's own."""
    folder.write("attempts/2/rank0.log", "2026-11-24 14:11:44,000 ERROR PeerError: rank 5 has gone\n")
    folder.write("attempts/2/rank1.log", "2026-11-24 14:11:44,100 ERROR PeerError: rank 5 has gone\n")
    folder.write("attempts/2/rank5.log", TRACE.format(row=17))
    folder.write("attempts/2/rank6.log", TRACE.format(row=4))
    folder.write("attempts/2/slurm.log", "srun: error: node2: task 1: Exited with exit code 6\nall is well\n")
    folder.write("attempts/2/node-3.log", "srun: error: node3: tasks 2-3: Terminated\n")
    errors = find_errors(log_files(choose_attempt(folder.path)))
    assert errors[0].files == ["rank5.log", "rank6.log"]
    assert [error.files for error in errors[1:]] == [["slurm.log"], ["node-3.log"], ["rank0.log", "rank1.log"]]
    assert [error.echo for error in errors] == [False, True, True, True]
    assert errors[0].text.startswith("Traceback") and errors[0].text.endswith("KeyError: 'level' of row 17")
    assert errors[0].headline == "KeyError: 'level' of row 17" and "going on" not in errors[0].text


def test_a_message_with_words_of_our_own_stands_for_its_traceback(folder: RunFolder) -> None:
    """Locks out the same failure three times: as words on the terminal, in the log, and as a traceback."""
    words = "error: 4 of 8 scores failed\nThe first: KeyError\n  traceback: attempts/2; mend what is named\n"
    folder.write("attempts/2/node-0.log", words)
    inside = 'Traceback (most recent call last):\n  File "x.py", line 1\nreward.BudgetError: 4 of 8 scores failed\n'
    stamp = "2026-11-24 14:11:44,000 INFO "
    folder.write("attempts/2/rank0.log", f"{stamp}{inside}The first: KeyError\n\n{stamp}{words}")
    (error,) = find_errors(log_files(choose_attempt(folder.path)))
    assert error.files == ["node-0.log", "rank0.log"] and error.headline == "error: 4 of 8 scores failed"


def test_what_slurm_says_of_the_end_is_heard(folder: RunFolder) -> None:
    """Locks out a silent end: the ranks cannot say that they ran out of memory or time."""
    folder.write(
        "attempts/2/slurm.log",
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.1.\n"
        "slurmstepd-node1: error: *** JOB 7 ON node1 CANCELLED AT 2026-11-24T14:55:37 DUE TO TIME LIMIT ***\n"
        "slurmstepd-node1: error: *** JOB 7 ON node1 CANCELLED AT 2026-11-24T14:55:37 DUE TO JOB REQUEUE ***\n"
        "slurmstepd-node1: error: *** STEP 7.1 ON node1 CANCELLED AT 2026-11-24T14:55:37 ***\n",
    )
    errors = find_errors(log_files(choose_attempt(folder.path)))
    assert [error.echo for error in errors] == [False, False, True]
    assert "oom-kill" in errors[0].text and "TIME LIMIT" in errors[1].text


def test_ordinary_lines_are_no_errors(folder: RunFolder) -> None:
    folder.write(
        "attempts/2/rank0.log",
        "2026-11-24 14:11:42,750 INFO latent 1/4 no errors, held-out error 0.3\n"
        "2026-11-24 14:11:42,751 INFO standard error of the mean 0.1\n",
    )
    assert find_errors(log_files(choose_attempt(folder.path))) == []


def test_the_last_lines_say_how_many_came_before(folder: RunFolder) -> None:
    folder.write("attempts/2/rank0.log", "".join(f"{n}\n" for n in range(10)))
    path = folder.path / "attempts" / "2" / "rank0.log"
    assert last_lines(path, 3) == (["7", "8", "9"], 7)
    assert last_lines(path, 0)[1] == 0


def test_following_goes_on_in_the_next_attempt_and_leaves_nothing_out(folder: RunFolder) -> None:
    """Locks out a follower that stays with the old attempt after a requeue, or loses the last line without a newline."""
    log = folder.path / "attempts" / "2" / "rank0.log"
    log.write_text("shown before\n")
    read = ends_of([log])
    rounds = iter(("new\nhalf a li", "ne\nlast words\n", None))

    def over() -> bool:
        text = next(rounds)
        if text is None:
            return True
        with log.open("a") as file:
            file.write(text)
        if "last" in text:
            folder.began(3)
            folder.write("attempts/3/rank0.log", "again\nno newline")
        return False

    seen = [(path.parent.name, line) for path, line in follow(folder.path, 0, read, over)]
    assert seen == [("2", "new"), ("2", "half a line"), ("2", "last words"), ("3", "again"), ("3", "no newline")]
