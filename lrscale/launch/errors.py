"""Why something was not started, with the exit code that says so to scripts."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What `lrscale` returns."""

    OK = 0
    USAGE = 2
    BAD_RECIPE = 3
    PREFLIGHT = 4
    REFUSED_BY_SLURM = 5
    RUN_FAILED = 6
    NOT_FOUND = 7
    TRY_LATER = 75
    INTERRUPTED = 130


class LaunchError(Exception):
    """A refusal that the user can do something about."""

    def __init__(self, message: str, *, code: ExitCode, place: str = "", help: str = "") -> None:
        lines = [f"error: {message}"]
        lines += [f"  {line}" for line in place.splitlines()]
        lines += [f"  help: {help}"] if help else []
        super().__init__("\n".join(lines))
        self.code = code
