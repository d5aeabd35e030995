"""metrics.jsonl: one JSON object a line, never half a line, never a NaN.

A run resumes to a checkpoint by cutting the file back to the size that the checkpoint
recorded, so a run that was killed and one that was not leave the same lines.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


class MetricsDamaged(ValueError):
    """A line other than the last is no JSON object: not a crash's doing, so nothing is dropped."""


class MetricsLog:
    """Appends to a metrics file; one writer at a time (rank 0 under the run's lock).

    Opening creates the file, keeps what is whole and drops a last line that a crash cut short.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
        self.dropped_bytes = self._repair()
        """Bytes of the half-written last line that opening dropped; 0 where the file was whole."""

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write one line. It is in the system's hands on return, so a killed process loses nothing.

        Raises ValueError where a number is not finite (the key is named) or `stage` or `step` is missing.
        """
        for key in ("stage", "step"):
            if key not in metrics:
                raise ValueError(
                    f"metrics without {key!r}: given keys {sorted(metrics)}; every line needs stage and step"
                )
        _refuse_non_finite(metrics, where="")
        try:
            text = json.dumps(metrics, ensure_ascii=False, allow_nan=False)
        except TypeError as error:
            raise ValueError(
                f"metrics hold a value JSON has no form for ({error}); give numbers, not tensors"
            ) from error
        line = (text + "\n").encode()
        size = self._size()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._write_failed(size, str(error)) from error
        if written != len(line):
            raise self._write_failed(size, "the disk took part of a line")

    @property
    def size_bytes(self) -> int:
        """Size of the file, made durable first: what a checkpoint records and `truncate` takes."""
        os.fsync(self._file.fileno())
        return self._size()

    def truncate(self, size_bytes: int) -> None:
        """Keep only the first `size_bytes` bytes: go back to the moment a checkpoint was written."""
        size = self._size()
        if not 0 <= size_bytes <= size:
            raise ValueError(
                f"{self.path} has {size} bytes, its checkpoint was written at {size_bytes}: lines were lost since. "
                "Restore the file, or resume from an older checkpoint"
            )
        if size_bytes and os.pread(self._file.fileno(), 1, size_bytes - 1) != b"\n":
            raise ValueError(f"{self.path}: byte {size_bytes} is inside a line; give a size that size_bytes returned")
        self._file.truncate(size_bytes)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _repair(self) -> int:
        self._file.seek(0)
        content = self._file.read()
        whole = _whole_prefix(content)
        if whole < len(content):
            self._file.truncate(whole)
        elif content and not content.endswith(b"\n"):
            self._file.write(b"\n")
        return len(content) - whole

    def _write_failed(self, size: int, reason: str) -> OSError:
        self._file.truncate(size)
        return OSError(
            f"cannot write {self.path}: {reason}. The file still ends with a whole line; free space and resume"
        )


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Every whole line of a metrics file, oldest first; also while it is being written.

    A last line that a crash cut short is left out. Raises FileNotFoundError, and MetricsDamaged
    with file and line where any other line is no JSON object.
    """
    content = Path(path).read_bytes()
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(content[: _whole_prefix(content)].split(b"\n"), start=1):
        if not line.strip():
            continue
        parsed = _parse(line)
        if parsed is None:
            raise MetricsDamaged(f"{path}:{number}: not a JSON object ({line[:60]!r}); remove that line to go on")
        lines.append(parsed)
    return lines


def without_times(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The line without clocks: keys that end in `_s` and `minutes`. What two equal runs must share bit for bit.

    Lines of the stage `reward` hold little else: queues and retries depend on who was busy when.
    """
    if metrics.get("stage") == "reward":
        return {key: value for key, value in metrics.items() if key in ("stage", "arm", "step")}
    return {key: value for key, value in metrics.items() if not key.endswith(("_s", "minutes"))}


def of_stage(metrics: Iterable[Mapping[str, Any]], stage: str, **equal: Any) -> list[Mapping[str, Any]]:
    """The lines of one stage whose keys have the given values, in order."""
    return [
        line
        for line in metrics
        if line.get("stage") == stage and all(line.get(key) == want for key, want in equal.items())
    ]


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a share, 95 % by default; (0, 1) where nothing was tried."""
    if n < 0 or not 0 <= successes <= max(n, 0):
        raise ValueError(f"wilson_interval needs 0 <= successes <= n, given {successes} of {n}")
    if n == 0:
        return (0.0, 1.0)
    share = successes / n
    spread = z * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    centre = share + z * z / (2.0 * n)
    scale = 1.0 + z * z / n
    # At 0 and at n the ends are exactly 0 and 1; rounding must not push the share outside.
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if successes == n else min(1.0, (centre + spread) / scale)
    return (low, high)


def _whole_prefix(content: bytes) -> int:
    """Bytes up to the end of the last whole line.

    Part of an object never parses, so a last line that does parse is whole even without its newline.
    """
    if not content:
        return 0
    stripped = content.rstrip(b"\n")
    start = stripped.rfind(b"\n") + 1
    return len(content) if not stripped or _parse(stripped[start:]) is not None else start


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _refuse_non_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metric {where!r} is {value}: non-finite values stop a run and are never written")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_non_finite(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_non_finite(item, f"{where}[{index}]")
