"""The logs of a start, whole or as they come.

attempts/N/slurm.log     the batch script and srun
attempts/N/node-K.log    what the launcher on node K and its ranks printed
attempts/N/rankR.log     what the worker of rank R logged
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lrscale.launch.attempts import Attempt, attempt_folders, read_attempt
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.overview import described
from lrscale.launch.status import ACTIVE, Cluster, status_of

_ORDER = re.compile(r"(slurm|node-|rank|role-)(\d*)")
_LOOK_S = 0.5
_ASK_S = 5.0


def choose_attempt(run_dir: Path, number: int | None = None) -> Attempt:
    """An attempt by its number, the newest without one.

    Raises:
        LaunchError: there is none (7).
    """
    folders = attempt_folders(run_dir)
    chosen = [folder for folder in folders if number is None or int(folder.name) == number]
    if not chosen:
        there = f"there are {folders[0].name} to {folders[-1].name}" if folders else "it has not started yet"
        which = "attempts" if number is None else f"attempt {number}"
        raise LaunchError(
            f"{run_dir} has no {which}: {there}",
            code=ExitCode.NOT_FOUND,
            help="lrscale status tells where a run stands" if not folders else "leave --attempt out for the newest",
        )
    return read_attempt(chosen[-1])


def log_files(attempt: Attempt, rank: int | None = None) -> list[Path]:
    """All logs of a start that hold anything, the batch script's first; of one rank only its own.

    Raises:
        LaunchError: there is no log of that rank (7).
    """
    found = sorted(attempt.folder.glob("*.log"), key=_place)
    if rank is None:
        early = attempt.folder.parent.parent / f"slurm-{attempt.job_id}.log"
        return [path for path in (early, *found) if path.is_file() and path.stat().st_size]
    chosen = [path for path in found if path.name == f"rank{rank}.log"]
    if not chosen:
        ranks = [path.stem for path in found if path.stem.startswith("rank")]
        raise LaunchError(
            f"{attempt.folder} has no log of rank {rank}",
            code=ExitCode.NOT_FOUND,
            help=f"it has {ranks[0]} to {ranks[-1]}" if ranks else "no rank has begun; leave --rank out",
        )
    return chosen


def early_logs(run_dir: Path) -> list[Path]:
    """What batch scripts said that never came to an attempt, the newest job's last."""
    found = [path for path in run_dir.glob("slurm-*.log") if path.stat().st_size]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def story_files(attempt: Attempt) -> list[Path]:
    """The logs to read first: the batch script's and the main rank's, or whatever there is."""
    found = log_files(attempt)
    return [path for path in found if path.name in ("slurm.log", "rank0.log")] or found


def last_lines(path: Path, count: int, end: int | None = None) -> tuple[list[str], int]:
    """The last `count` lines (0: all) of a log, of its first `end` bytes, and how many come before them."""
    lines = path.read_bytes()[:end].decode("utf-8", errors="replace").splitlines()
    left_out = max(len(lines) - count, 0) if count else 0
    return lines[left_out:], left_out


def newest_files(run_dir: Path, rank: int | None) -> list[Path]:
    """The logs to begin following with: those of the newest attempt that are there."""
    folders = attempt_folders(run_dir)
    if not folders:
        return []
    attempt = read_attempt(folders[-1])
    files = story_files(attempt) if rank is None else [attempt.folder / f"rank{rank}.log"]
    return [path for path in files if path.is_file()]


class RunWatch:
    """Tells whether a run has ended, and says how its state changes; asks SLURM only now and then."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._say = say
        self._cluster = Cluster()
        self._next_s = 0.0
        self._told = ""
        self._over = False

    def over(self) -> bool:
        """Whether nothing can come any more."""
        if time.monotonic() >= self._next_s:
            status = status_of(self._run_dir, self._cluster)
            head = described(status).partition("\n")[0]
            if head != self._told:
                self._told = head
                self._say(head)
            self._over = status.state not in ACTIVE
            self._next_s = time.monotonic() + _ASK_S
        return self._over


def former_ends(run_dir: Path, number: int) -> list[str]:
    """How the attempts before this one ended, in words."""
    attempts = [read_attempt(folder) for folder in attempt_folders(run_dir) if int(folder.name) < number]
    return [f"attempt {one.number} ended: {one.end.get('reason')}" for one in attempts if one.end]


def ends_of(files: Sequence[Path]) -> dict[Path, int]:
    """Bytes of whole lines in each log: what has been read."""
    return {path: path.read_bytes().rfind(b"\n") + 1 for path in files}


def follow(
    run_dir: Path, rank: int | None, read: dict[Path, int], over: Callable[[], bool]
) -> Iterator[tuple[Path, str]]:
    """Lines of logs as they come, (file, line): of the attempt that was read, and of those that begin meanwhile.

    Args:
        run_dir: The run.
        rank: Only this rank's log; None: those of `story_files`.
        read: Bytes of each log that were shown before; none: the newest attempt from its beginning.
        over: Whether anything can still come; what is there is given first.
    """
    positions = dict(read)
    first = min((int(path.parent.name) for path in read), default=0)
    while True:
        last = over()
        folders = attempt_folders(run_dir)
        first = first or (int(folders[-1].name) if folders else 0)
        for folder in (folder for folder in folders if int(folder.name) >= first):
            attempt = read_attempt(folder)
            files = story_files(attempt) if rank is None else [folder / f"rank{rank}.log"]
            for path in files:
                for line in _new_lines(path, positions, whole=not last):
                    yield path, line
        if last:
            return
        time.sleep(_LOOK_S)


def _new_lines(path: Path, positions: dict[Path, int], *, whole: bool) -> Iterator[str]:
    """What has come since; a line that is being written waits, unless nothing more can come."""
    try:
        with path.open("rb") as file:
            file.seek(positions.get(path, 0))
            content = file.read()
    except OSError:
        return
    if whole:
        content = content[: content.rfind(b"\n") + 1]
    positions[path] = positions.get(path, 0) + len(content)
    yield from content.decode("utf-8", errors="replace").splitlines()


def _place(path: Path) -> tuple[int, int, str]:
    match = _ORDER.match(path.name)
    if match is None:
        return (9, 0, path.name)
    return (("slurm", "node-", "role-", "rank").index(match[1]), int(match[2] or 0), path.name)
