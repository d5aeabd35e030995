"""What became of a run: told from its folder, and from SLURM where the folder does not settle it.

done.json, or attempts/N/end.json of the last job     settled: SLURM is not asked
a job that was submitted since                        SLURM knows: queued, running, over, or unknown
no job                                                a run on this machine: its lock, its exit.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lrscale.config.diagnosis import Check
from lrscale.launch import reasons, slurm
from lrscale.launch.attempts import (
    Attempt,
    Failure,
    failed_checks,
    first_failure,
    latest_attempt,
    lock_holder,
    read_object,
    submitted_jobs,
    unfit_nodes,
)
from lrscale.launch.errors import ExitCode
from lrscale.launch.logged_errors import find_errors
from lrscale.launch.progress import Progress, SavedStep, last_checkpoint, read_progress

State = Literal[
    "not started",
    "queued",
    "running",
    "draining",
    "waiting for requeue",
    "finished",
    "failed",
    "cancelled",
    "stopped",
    "vanished",
]
ACTIVE: tuple[State, ...] = ("queued", "running", "draining", "waiting for requeue")
_SETTLED: tuple[State, ...] = ("finished", "failed", "cancelled", "stopped")
_READ_BYTES = 4 << 20
_AT_A_TIME = 8
_IN_QUEUE = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED")


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at one moment."""

    path: Path
    state: State
    reason: str = ""
    """Why it is in that state, in words; empty where there is nothing to say."""
    job_id: int | None = None
    nodes: str = ""
    """SLURM's list, or the host of a run without SLURM."""
    attempt: int | None = None
    restarts: int = 0
    since: float | None = None
    """Unix time: submitted, started or ended, whichever the state speaks of."""
    expected: float | None = None
    """Unix time at which SLURM expects to start a queued job."""
    ends: float | None = None
    """Unix time at which a running job has to end by its time limit."""
    progress: Progress | None = None
    checkpoint: SavedStep | None = None
    failure: Failure | None = None
    error: str = ""
    """Where a run failed and no rank could say why: the first error in the logs of its nodes."""
    preflight: tuple[Check, ...] = ()
    """What failed in the preflight of this attempt."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Nodes that are left out, and why."""
    unanswered: str = ""
    """Why SLURM could not be asked: the state is then what the folder tells."""

    @property
    def name(self) -> str:
        return self.path.name

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self), "path": str(self.path.resolve())}


class Cluster:
    """Asks SLURM, but not again once it has not answered: every client would hang."""

    def __init__(self) -> None:
        self.unanswered = ""

    def find_job(self, job_id: int) -> slurm.Job | None:
        """None where nobody knows the job. Raises SlurmUnreachable or NoSlurm."""
        if self.unanswered:
            raise slurm.SlurmUnreachable("asked before", self.unanswered)
        try:
            return slurm.find_job(job_id)
        except slurm.NoSlurm:
            self.unanswered = "SLURM's commands are not on this machine"
            raise
        except slurm.SlurmUnreachable as error:
            self.unanswered = str(error).splitlines()[0].removeprefix("error: ")
            raise


def status_of(run_dir: Path, cluster: Cluster | None = None) -> RunStatus:
    """The state of a run directory. A cluster that does not answer is no error: see `unanswered`."""
    found = _status(run_dir, cluster)
    if found.state == "failed" and found.failure is None and found.attempt is not None:
        return replace(found, error=_first_error(run_dir / "attempts" / str(found.attempt)))
    return found


def statuses_of(run_dirs: Sequence[Path]) -> list[RunStatus]:
    """Of many runs, in their order; several questions to SLURM are under way at a time."""
    cluster = Cluster()
    with ThreadPoolExecutor(max_workers=_AT_A_TIME) as pool:
        return list(pool.map(lambda run_dir: status_of(run_dir, cluster), run_dirs))


def _first_error(attempt: Path) -> str:
    logs = [*sorted(attempt.glob("node-*.log")), attempt / "slurm.log"]
    small = [path for path in logs if path.is_file() and path.stat().st_size < _READ_BYTES]
    return next((error.headline for error in find_errors(small) if not error.echo), "")


def _status(run_dir: Path, cluster: Cluster | None) -> RunStatus:
    attempt = latest_attempt(run_dir)
    failure = first_failure(attempt) if attempt is not None else None
    known = RunStatus(
        run_dir,
        "not started",
        attempt=attempt.number if attempt else None,
        progress=read_progress(run_dir),
        checkpoint=last_checkpoint(run_dir),
        failure=failure,
        unfit=unfit_nodes(run_dir),
        preflight=tuple(failed_checks(attempt)) if attempt is not None else (),
    )
    jobs = submitted_jobs(run_dir)
    done = read_object(run_dir / "done.json")
    if done is not None:
        job_id = attempt.job_id if attempt else None
        return replace(known, state="finished", since=done.get("finished"), job_id=job_id, failure=None, preflight=())
    if jobs and not _local_since(attempt, jobs[-1]):
        return _of_job(known, attempt, jobs[-1], cluster or Cluster())
    return _without_slurm(known, attempt)


def exit_code_of(statuses: list[RunStatus]) -> int:
    """75 where SLURM had to be asked and did not answer."""
    return ExitCode.TRY_LATER if any(status.unanswered for status in statuses) else ExitCode.OK


def _local_since(attempt: Attempt | None, submission: Mapping[str, Any]) -> bool:
    """Whether a run that had jobs was gone on with on a machine of its own."""
    if attempt is None or attempt.job_id is not None:
        return False
    if all(path.name.startswith(".") for path in attempt.folder.iterdir()):  # a batch script is just making it
        return False
    began = attempt.started or attempt.folder.stat().st_mtime
    return began > (submission.get("submitted") or 0.0)


def _of_job(known: RunStatus, attempt: Attempt | None, submission: Mapping[str, Any], cluster: Cluster) -> RunStatus:
    job_id = int(submission["job_id"])
    known = replace(known, job_id=job_id)
    if attempt is not None and attempt.job_id != job_id:  # of a former job: this one has not begun
        attempt, known = None, replace(known, failure=None, preflight=())
    if attempt is not None and (attempt.end or {}).get("state") in _SETTLED:
        return _settled(known, attempt)
    try:
        job = cluster.find_job(job_id)
    except (slurm.SlurmUnreachable, slurm.NoSlurm):
        return _by_folder(replace(known, unanswered=cluster.unanswered), attempt, submission)
    if job is None:
        return _unknown_to_slurm(known, attempt)
    known = replace(known, nodes=job.nodes, restarts=job.restarts)
    if job.state in _IN_QUEUE:
        return _in_queue(known, attempt, job)
    if job.over:
        # The last words may have been written while SLURM was asked.
        attempt = latest_attempt(known.path) if attempt is not None else None
        if attempt is not None and (attempt.end or {}).get("state") in _SETTLED:
            return _settled(known, attempt)
        return _over(known, attempt, job)
    going = replace(known, state="running", since=job.started, ends=job.ends)
    if attempt is None or attempt.end is not None:  # the batch script is about to make the next attempt
        return replace(going, reason="the job is starting")
    if attempt.draining:
        return replace(going, state="draining", reason="it saves a checkpoint, then ends")
    return replace(going, reason=_beginning(attempt))


def _beginning(attempt: Attempt) -> str:
    """What happens before the ranks have their logs; empty once they do."""
    if (attempt.folder / "rank0.log").exists():
        return ""
    recipe = read_object(attempt.folder.parent.parent / "recipe.json") or {}
    looks = (recipe.get("cluster") or {}).get("preflight", True)
    if looks and not (attempt.folder / "preflight.json").exists():
        return "the nodes are being looked at (preflight)"
    return "the ranks are starting"


def _settled(known: RunStatus, attempt: Attempt) -> RunStatus:
    end = attempt.end or {}
    state: State = end["state"]
    failure = known.failure if state == "failed" else None
    reason = "" if state == "finished" else str(end.get("reason") or "")
    return replace(known, state=state, reason=reason, failure=failure, nodes=_span(attempt.nodes), since=attempt.ended)


def _in_queue(known: RunStatus, attempt: Attempt | None, job: slurm.Job) -> RunStatus:
    why = reasons.waiting(job.reason)
    waits = replace(known, reason=why, since=job.submitted, expected=job.started, nodes="")
    if attempt is None and not job.restarts:
        return replace(waits, state="queued")
    before = str((attempt.end or {}).get("reason") or "") if attempt is not None else ""
    return replace(waits, state="waiting for requeue", reason="; ".join(word for word in (before, why) if word))


def _over(known: RunStatus, attempt: Attempt | None, job: slurm.Job) -> RunStatus:
    """A job that ended without the batch script's last words."""
    over = replace(known, since=job.ends)
    if job.state == "CANCELLED":
        return replace(over, state="cancelled", reason="cancelled" if attempt else "cancelled before it started")
    why = reasons.ended(job.state, job.reason)
    return replace(over, state="failed", reason=why)


def _unknown_to_slurm(known: RunStatus, attempt: Attempt | None) -> RunStatus:
    if attempt is not None and attempt.exit is not None and known.failure is not None:
        return replace(known, state="failed", reason=known.failure.reason, since=attempt.ended)
    why = f"SLURM does not know job {known.job_id} (any more), and it left no end mark"
    return replace(known, state="vanished", reason=why, nodes=_span(attempt.nodes) if attempt else "")


def _by_folder(known: RunStatus, attempt: Attempt | None, submission: Mapping[str, Any]) -> RunStatus:
    """SLURM does not answer: what was last heard of the job."""
    if attempt is None:
        return replace(known, state="queued", reason="as far as the folder tells", since=submission.get("submitted"))
    if attempt.end is not None:
        return replace(known, state="waiting for requeue", reason=str(attempt.end.get("reason") or ""))
    state: State = "draining" if attempt.draining else "running"
    reason = "as far as the folder tells"
    return replace(known, state=state, reason=reason, nodes=_span(attempt.nodes), since=attempt.started)


def _without_slurm(known: RunStatus, attempt: Attempt | None) -> RunStatus:
    holder = lock_holder(known.path)
    if holder is not None and holder.held:
        state: State = "draining" if attempt is not None and attempt.draining else "running"
        return replace(known, state=state, reason=str(holder), nodes=holder.host, failure=None)
    if attempt is None:
        return known
    if attempt.exit is None and known.failure is None:
        who = f"{holder} ended" if holder is not None else "its process ended"
        return replace(known, state="vanished", reason=f"{who} without a word: killed, or the machine went down")
    ended = replace(known, since=attempt.ended)
    if known.failure is not None:
        return replace(ended, state="failed", reason=known.failure.reason)
    reason = str((attempt.exit or {}).get("reason") or "")
    return replace(ended, state="stopped", reason=reason)


def _span(nodes: list[str]) -> str:
    return ",".join(nodes)
