"""The errors in the logs of a start: causes first, and each told once however many ranks repeat it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TRACEBACK = "Traceback (most recent call last):"
_ERROR = re.compile(
    r"^(?:\S+: )*(?:error|fatal): |CUDA error|NCCL (?:WARN|ERROR)|ncclInternalError"
    r"|DUE TO (?:TIME LIMIT|PREEMPTION|NODE FAILURE)|oom[-_ ]kill|Out Of Memory|[Ss]egmentation fault|core dumped",
)
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:,\d+)? (?P<level>[A-Z]+) ")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
_KIND = re.compile(r"^(?:error|[\w.]*(?:Error|Exception|Interrupt|Warning)): ")
_ECHO = re.compile(
    r"PeerError|Connection closed by peer|Connection reset by peer|Broken pipe|out of reach"
    r"|Exited with exit code|: tasks? \S+: (?:Terminated|Killed)|CANCELLED AT \S+ \*\*\*"
)
"""Words of ranks, and of SLURM, about the end of another one."""
_ORDINARY = "DUE TO JOB REQUEUE"
"""SLURM calls an error what the batch script has asked for."""


@dataclass(slots=True)
class LoggedError:
    """An error and everywhere it stands."""

    text: str
    """The message with what belongs to it; a traceback where there are no words of our own."""
    echo: bool
    """Only says that something else has ended."""
    files: list[str] = field(default_factory=list)
    """Names of the logs that hold it, or hold one that differs in numbers alone."""

    @property
    def headline(self) -> str:
        """Its one line to read: of a traceback, the exception."""
        return _headline(self.text.split("\n"))

    def tells(self, reason: str) -> bool:
        """Whether it is what a rank has given as its reason."""
        return _key(self.headline) == _key(reason.partition("\n")[0])


def find_errors(files: Sequence[Path]) -> list[LoggedError]:
    """Every different error, in the order of files and lines; then the echoes."""
    found: dict[str, LoggedError] = {}
    for path in files:
        for lines in _errors_in(path.read_text(encoding="utf-8", errors="replace").splitlines()):
            headline = _headline(lines)
            error = found.setdefault(_key(headline), LoggedError("\n".join(lines), _ECHO.search(headline) is not None))
            if error.text.startswith(_TRACEBACK) and not lines[0].startswith(_TRACEBACK):
                error.text = "\n".join(lines)
            if path.name not in error.files:
                error.files.append(path.name)
    return sorted(found.values(), key=lambda error: error.echo)


def _key(headline: str) -> str:
    """Equal for what differs in numbers alone, and for an exception and the words about it."""
    return _NUMBER.sub("#", _KIND.sub("", headline))


def _headline(lines: Sequence[str]) -> str:
    if not lines[0].startswith(_TRACEBACK):
        return lines[0]
    own = [line for line in lines[1:] if line and not line.startswith((" ", "\t"))]
    return own[0] if own else lines[-1]


def _errors_in(lines: Sequence[str]) -> Iterator[list[str]]:
    for block in _blocks(lines):
        for index, line in enumerate(block):
            if _begins(line):
                yield _whole([_STAMP.sub("", line), *block[index + 1 :]])
                break


def _begins(line: str) -> bool:
    stamp = _STAMP.match(line)
    words = _STAMP.sub("", line)
    if _ORDINARY in words:
        return False
    return (
        words.startswith(_TRACEBACK)
        or _ERROR.search(words) is not None
        or (stamp is not None and stamp["level"] in ("ERROR", "CRITICAL"))
    )


def _whole(lines: list[str]) -> list[str]:
    while lines[-1:] == [""]:
        lines.pop()
    return lines


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    """Records: from one time stamp to the next; without stamps, a line with what is indented under it."""
    stamped = any(map(_STAMP.match, lines))
    block: list[str] = []
    for line in lines:
        if block and (_STAMP.match(line) if stamped else _ends(block, line)):
            yield block
            block = []
        block.append(line)
    if block:
        yield block


def _ends(block: Sequence[str], line: str) -> bool:
    """Whether an unstamped line begins something new: it is not indented, nor the exception under a traceback."""
    if line.startswith((" ", "\t")):
        return False
    return not (block[0].startswith(_TRACEBACK) and block[-1].startswith((" ", "\t")))
