"""Questions and orders to SLURM: the one place that calls its clients, each with a time-out.

Clients hang while slurmctld is down, so every call can end in SlurmUnreachable; there is no answer then, and what the
run directory says is all that is known.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.plan.duration import duration_s

TIMEOUT_S = 10.0
_SUBMIT_TIMEOUT_S = 60.0
_OVER = frozenset(
    ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
)
_UNREACHABLE = re.compile(
    r"unable to contact slurm controller|connect(ion)? (failure|refused|timed out)|socket timed out|zero bytes were",
    re.IGNORECASE,
)
_UNKNOWN_JOB = re.compile(r"invalid job id", re.IGNORECASE)
_PREFIX = re.compile(r"^(sbatch|scontrol|squeue|sinfo|sacct|scancel): (error: )?", re.MULTILINE)


class SlurmUnreachable(LaunchError):
    """The controller does not answer."""

    def __init__(self, command: str, why: str) -> None:
        super().__init__(
            f"SLURM's controller does not answer ({command}: {why})",
            code=ExitCode.TRY_LATER,
            help="try again later; nothing was submitted or changed by this command",
        )


class NoSlurm(LaunchError):
    """SLURM's commands are not on this machine."""

    def __init__(self, command: str) -> None:
        super().__init__(
            f"{command} is not on PATH: this machine is no login node of a SLURM cluster",
            code=ExitCode.REFUSED_BY_SLURM,
            help="log in to the cluster (or load its slurm module); --dry-run shows the plan anywhere, "
            "--local runs on this machine",
        )


@dataclass(frozen=True, slots=True)
class Job:
    """What SLURM knows of a job."""

    job_id: int
    state: str
    """SLURM's word: PENDING, RUNNING, COMPLETING, COMPLETED, CANCELLED, FAILED, TIMEOUT, NODE_FAIL ..."""
    reason: str = ""
    """Why it waits or ended, in SLURM's word; empty where there is none."""
    nodes: str = ""
    """SLURM's list, as in node[1-4]; empty while it waits."""
    restarts: int = 0
    submitted: float | None = None
    """Unix times here and below."""
    started: float | None = None
    """While it waits, when SLURM expects to start it, where SLURM knows."""
    ends: float | None = None
    """When it ended, or has to by its time limit."""

    @property
    def over(self) -> bool:
        """Whether it is at its end for good; COMPLETING is not yet, for a job may be on its way back into the queue."""
        return self.state in _OVER


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition as far as a launch has to fit into it."""

    name: str
    default: bool
    up: bool
    nodes: int
    """Nodes it has, whatever their state."""
    nodes_usable: int
    """Those that are not down, drained or failing."""
    max_nodes: int | None
    """Most nodes a job may take; None without a limit."""
    max_time_s: int | None
    """Longest time limit of a job; None without a limit."""
    gpus_per_node: int
    """GPUs of the node with the most of them."""
    cpus_per_node: int
    memory_mib: int
    """Of the node with the most of it."""


def available() -> bool:
    """Whether SLURM's commands are on PATH."""
    return shutil.which("sbatch") is not None


def submit(command: Sequence[str]) -> int:
    """Run an sbatch command line; the id of the job.

    Raises:
        LaunchError: SLURM refused it, in SLURM's words (5), or does not answer (75).
    """
    said = _ask([*command[:1], "--parsable", *command[1:]], timeout_s=_SUBMIT_TIMEOUT_S)
    found = re.match(r"(\d+)", said.strip())
    if found is None:
        raise LaunchError(f"sbatch said no job id: {said.strip()!r}", code=ExitCode.REFUSED_BY_SLURM)
    return int(found[1])


def test_only(command: Sequence[str]) -> str:
    """When and where SLURM could start a job, in SLURM's words; nothing is submitted.

    Raises:
        LaunchError: never, as it stands (5), or SLURM does not answer (75).
    """
    done = _run([*command[:1], "--test-only", *command[1:]], timeout_s=_SUBMIT_TIMEOUT_S)
    words = _PREFIX.sub("", done.stderr.strip())
    if done.returncode:
        raise LaunchError(f"SLURM could not start this job: {words}", code=ExitCode.REFUSED_BY_SLURM)
    return words


def cancel(job_id: int, *, signal: str | None = None) -> None:
    """End a job; with a signal's name ("USR2"), send that to its batch script instead."""
    _ask(["scancel", *([f"--signal={signal}", "--batch"] if signal else []), str(job_id)])


def find_job(job_id: int) -> Job | None:
    """What is known of a job: by squeue, else scontrol, else the accounting; None where nobody knows it (any more).

    Raises:
        SlurmUnreachable: the controller does not answer, and there is no accounting that does.
        NoSlurm: SLURM is not on this machine.
    """
    unreachable: SlurmUnreachable | None = None
    try:
        job = _by_squeue(job_id) or _by_scontrol(job_id)
    except SlurmUnreachable as error:
        job, unreachable = None, error
    job = job or _by_sacct(job_id)  # the accounting has a daemon of its own
    if job is None and unreachable is not None:
        raise unreachable
    return job


def partitions() -> dict[str, Partition]:
    """Every partition by its name.

    Raises:
        LaunchError: SLURM does not answer (75) or is not here (5).
    """
    # %s of sinfo is "1-infinite": fewest and most nodes of a job.
    found: dict[str, Partition] = {}
    for line in _ask(["sinfo", "--noheader", "--all", "--format=%P|%a|%l|%s|%D|%T|%G|%c|%m"]).splitlines():
        name, up, time, size, count, state, gres, cpus, memory = line.split("|")
        usable = not state.startswith(("down", "drain", "fail", "inval", "unk", "future", "power"))
        former = found.get(name.rstrip("*"))
        found[name.rstrip("*")] = Partition(
            name.rstrip("*"),
            default=name.endswith("*"),
            up=up == "up",
            nodes=int(count) + (former.nodes if former else 0),
            nodes_usable=(int(count) if usable else 0) + (former.nodes_usable if former else 0),
            max_nodes=_limit(size.rpartition("-")[2]),
            max_time_s=None if time in ("infinite", "n/a") else duration_s(time),
            gpus_per_node=max(_gpus(gres), former.gpus_per_node if former else 0),
            cpus_per_node=max(_leading(cpus), former.cpus_per_node if former else 0),
            memory_mib=max(_leading(memory), former.memory_mib if former else 0),
        )
    return found


def _by_squeue(job_id: int) -> Job | None:
    done = _run(["squeue", "--json", f"--jobs={job_id}"])
    if _unknown(done):
        return None
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:  # a SLURM without JSON
        return None
    listed: list[dict[str, Any]] = answer.get("jobs") or []
    if answer.get("errors") and not listed:  # a dead controller gives exit code 0 here
        raise SlurmUnreachable("squeue", str(answer["errors"][0].get("description") or "it could not load jobs"))
    # Old releases list all jobs, whatever was asked for.
    for entry in listed:
        if _number(entry.get("job_id")) == job_id:
            return Job(
                job_id,
                state=_state(entry.get("job_state", "")),
                reason=_word(entry.get("state_reason")),
                nodes=_word(entry.get("nodes")),
                restarts=_number(entry.get("restart_cnt")) or 0,
                submitted=_number(entry.get("submit_time")),
                started=_number(entry.get("start_time")),
                ends=_number(entry.get("end_time")),
            )
    return None


def _by_scontrol(job_id: int) -> Job | None:
    done = _run(["scontrol", "--oneliner", "show", "job", str(job_id)])
    if _unknown(done):
        return None
    values = dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", done.stdout.splitlines()[0]))
    return Job(
        job_id,
        state=values.get("JobState", ""),
        reason=_word(values.get("Reason")),
        nodes=_word(values.get("NodeList")),
        restarts=int(values.get("Restarts") or 0),
        submitted=_time(values.get("SubmitTime")),
        started=_time(values.get("StartTime")),
        ends=_time(values.get("EndTime")),
    )


def _by_sacct(job_id: int) -> Job | None:
    """From slurmdbd where there is one, else from the file that small clusters keep of ended jobs."""
    columns = "--format=JobID,State,NodeList,Start,End"
    for kind in (["--allocations"], ["--completion"]):
        try:
            done = _run(["sacct", *kind, "--parsable2", "--noheader", f"--jobs={job_id}", columns])
        except NoSlurm:
            return None
        lines = [line.split("|") for line in done.stdout.splitlines() if line.startswith(f"{job_id}|")]
        if done.returncode == 0 and lines:
            _, state, nodes, started, ended = lines[-1]  # a line a start: the last one counts
            return Job(
                job_id, state.split()[0], nodes=_word(nodes), restarts=0, started=_time(started), ends=_time(ended)
            )
    return None


def _unknown(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a client failed because there is no such job; what else it fails of is raised."""
    if done.returncode and not _UNKNOWN_JOB.search(done.stderr):
        raise SlurmUnreachable(done.args[0], _PREFIX.sub("", done.stderr.strip()))
    return done.returncode != 0


def _ask(command: Sequence[str], *, timeout_s: float | None = None) -> str:
    """A client's stdout; LaunchError in its words where it fails."""
    done = _run(command, timeout_s=timeout_s)
    if done.returncode:
        words = _PREFIX.sub("", done.stderr.strip()) or f"exit code {done.returncode}"
        raise LaunchError(f"{command[0]} refused: {words}", code=ExitCode.REFUSED_BY_SLURM)
    return done.stdout


def _run(command: Sequence[str], *, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    timeout_s = timeout_s or TIMEOUT_S
    try:
        done = subprocess.run(
            list(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
    except FileNotFoundError:
        raise NoSlurm(command[0]) from None
    except subprocess.TimeoutExpired:
        raise SlurmUnreachable(command[0], f"no answer in {timeout_s:g} s") from None
    if done.returncode and _UNREACHABLE.search(done.stderr):
        raise SlurmUnreachable(command[0], _PREFIX.sub("", done.stderr.strip().splitlines()[-1]))
    return done


def _state(value: str | list[str]) -> str:
    """One word: newer releases give a list, COMPLETING beside the state that the job ends with."""
    if isinstance(value, str):
        return value
    return "COMPLETING" if "COMPLETING" in value else next(iter(value), "")


def _number(value: int | Mapping[str, Any] | None) -> int | None:
    """Newer releases write {"set": true, "infinite": false, "number": 5}; 0 stands for a time that is not known."""
    if isinstance(value, Mapping):
        value = value["number"] if value.get("set") and not value.get("infinite") else None
    return value or None


def _word(text: str | None) -> str:
    return "" if text in (None, "None", "(null)", "None assigned") else str(text)


def _time(text: str | None) -> float | None:
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return None


def _leading(text: str) -> int:
    """sinfo writes `16+` where nodes differ."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0


def _limit(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _gpus(gres: str) -> int:
    """GPUs in a node's list of resources, such as gpu:h100:8(S:0-1),nvme:1."""
    counts: Callable[[str], list[str]] = re.compile(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)").findall
    return sum(map(int, counts(gres)))
