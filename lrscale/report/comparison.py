"""Are two runs the same, bit for bit? Clocks apart, that is what exact resume promises. Torch-free."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.report.metrics import read_metrics, without_times


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was compared, and where it parts."""

    lines: int
    """Of metrics.jsonl."""
    model_files: int
    difference: str | None
    """The first one, in words; None where all is equal."""


def compare_runs(first: Path, second: Path) -> Comparison:
    """Metrics line by line (times apart), then every file of weights byte by byte.

    Raises:
        FileNotFoundError: one of them has no metrics.
    """
    ours, theirs = (
        [without_times(line) for line in read_metrics(folder / "metrics.jsonl")] for folder in (first, second)
    )
    models = sorted({path.relative_to(folder) for folder in (first, second) for path in _model_files(folder)})
    difference = _differing_line(ours, theirs) or _differing_file(first, second, models)
    return Comparison(len(ours), len(models), difference)


def _differing_line(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        if one != other:
            key = next(key for key in {**one, **other} if one.get(key) != other.get(key))
            return (
                f"metrics line {number} ({_where(one)}): {key} is {one.get(key)} in one, {other.get(key)} in the other"
            )
    if len(ours) != len(theirs):
        return f"one has {len(ours)} lines of metrics, the other {len(theirs)}"
    return None


def _where(line: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {line[key]}" for key in ("stage", "arm", "step") if key in line)


def _differing_file(first: Path, second: Path, models: list[Path]) -> str | None:
    for path in models:
        if not ((first / path).is_file() and (second / path).is_file()):
            return f"{path} is in one of them only"
        if not filecmp.cmp(first / path, second / path, shallow=False):
            return f"{path}: the weights differ, though the metrics do not"
    return None


def _model_files(folder: Path) -> list[Path]:
    return list((folder / "models").glob("*/*.safetensors"))
