"""What the submissions and the starts of a run have left in its folder.

jobs.jsonl               a line a submission: job_id, submitted, nodes
attempts/N/job.json      by the batch script: job_id, restart_count, nodes, started
attempts/N/drain         touched to ask for a checkpoint and an end
attempts/N/checkpointed  the main rank has saved because of it: stage, step
attempts/N/exit.json     by the main rank, and rankN-exit.json by each of several: code, reason, started, ended
attempts/N/end.json      by the batch script, last: state, reason, ended
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.config.diagnosis import Check, failed

JOBS = "jobs.jsonl"
DRAIN = "drain"
_PEER_CODES = (0, 130)
"""Exit codes of ranks that were done, or ended by somebody else."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of the rank that failed first."""

    rank: int
    code: int
    reason: str
    node: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run; the files are read once, those that are missing or cut short are None."""

    folder: Path
    job: Mapping[str, Any] | None
    exit: Mapping[str, Any] | None
    end: Mapping[str, Any] | None
    draining: bool
    """Somebody has asked it to save and end."""

    @property
    def number(self) -> int:
        return int(self.folder.name)

    @property
    def job_id(self) -> int | None:
        """None for a start without SLURM."""
        found = (self.job or {}).get("job_id")
        return found if isinstance(found, int) else None

    @property
    def nodes(self) -> list[str]:
        return [str(name) for name in (self.job or {}).get("nodes") or ()]

    @property
    def started(self) -> float | None:
        """Unix time, as the batch script or the main rank has written it."""
        return _number((self.job or {}).get("started")) or _number((self.exit or {}).get("started"))

    @property
    def ended(self) -> float | None:
        return _number((self.end or {}).get("ended")) or _number((self.exit or {}).get("ended"))


def read_attempt(folder: Path) -> Attempt:
    """One of attempts/N."""
    job, exit_, end = (read_object(folder / name) for name in ("job.json", "exit.json", "end.json"))
    return Attempt(folder, job, exit_, end, draining=(folder / DRAIN).exists())


def attempt_folders(run_dir: Path) -> list[Path]:
    """attempts/1, attempts/2 ..., the newest last."""
    folder = run_dir / "attempts"
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def latest_attempt(run_dir: Path) -> Attempt | None:
    """The newest start; None before the first."""
    folders = attempt_folders(run_dir)
    return read_attempt(folders[-1]) if folders else None


def first_failure(attempt: Attempt) -> Failure | None:
    """The rank that failed first of its own accord; None where none has said so."""
    ends = {0: attempt.exit} if attempt.exit else {}
    for path in attempt.folder.glob("rank*-exit.json"):
        number = path.name.removeprefix("rank").removesuffix("-exit.json")
        found = read_object(path)
        if number.isdigit() and found:
            ends[int(number)] = found
    failed = {rank: end for rank, end in ends.items() if end.get("code") not in _PEER_CODES}
    if not failed:
        return None
    rank = min(failed, key=lambda rank: (_number(failed[rank].get("ended")) or 0.0, rank))
    end = failed[rank]
    return Failure(rank, int(end.get("code") or 0), str(end.get("reason") or ""), _node_of(attempt, rank))


def failed_checks(attempt: Attempt) -> list[Check]:
    """What kept an attempt from starting, as its preflight has written it down."""
    try:
        values = json.loads((attempt.folder / "preflight.json").read_text(encoding="utf-8"))
        return failed([Check.from_json(value) for value in values])
    except (OSError, ValueError, TypeError):
        return []


def submitted_jobs(run_dir: Path) -> list[Mapping[str, Any]]:
    """Lines of jobs.jsonl, the newest last; jobs that were submitted by hand are known by the attempts they made."""
    path = run_dir / JOBS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    jobs: list[Mapping[str, Any]] = [
        job for job in map(_object, lines) if job is not None and isinstance(job.get("job_id"), int)
    ]
    latest = latest_attempt(run_dir)
    if latest is not None and latest.job_id is not None and latest.job_id not in [job["job_id"] for job in jobs]:
        jobs.append({"job_id": latest.job_id, "submitted": None, "nodes": len(latest.nodes), "sbatch": None})
    return jobs


def unfit_nodes(run_dir: Path) -> dict[str, str]:
    """Nodes that a preflight has found unfit, with the reasons: `NAME reason` a line of bad_nodes.txt."""
    try:
        lines = (run_dir / "bad_nodes.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name: reason for name, _, reason in (line.strip().partition(" ") for line in lines) if name}


@dataclass(frozen=True, slots=True)
class Holder:
    """Whoever has, or had, the run's lock."""

    held: bool
    """Now, as far as this machine can tell."""
    pid: int | None = None
    host: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "an unknown process"


def lock_holder(run_dir: Path) -> Holder | None:
    """Who holds the lock, or left its name there by being killed; None where nobody does."""
    path = run_dir / "lock"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                held = False
            except BlockingIOError:
                held = True
            said = _object(file.read()) or {}
    except OSError:
        return None
    pid = said.get("pid")
    holder = Holder(held, pid if isinstance(pid, int) else None, str(said.get("host", "")))
    return holder if held or holder.pid else None


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file is missing, being written, or something else."""
    try:
        return _object(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _node_of(attempt: Attempt, rank: int) -> str:
    recipe = read_object(attempt.folder.parent.parent / "recipe.json") or {}
    parallel, cluster = recipe.get("parallel") or {}, recipe.get("cluster") or {}
    ranks_per_node = parallel.get("ranks_per_node") or cluster.get("gpus_per_node") or 1
    index = rank // int(ranks_per_node)
    return attempt.nodes[index] if index < len(attempt.nodes) else ""


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
