"""A run directory as the report reads it: forgiving about what is not there yet, clear about what never was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.report.metrics import read_metrics

Metrics = Mapping[str, Any]

ARM_TITLES = {
    "latent": "latent",
    "discrete": "discrete",
    "zero_latent": "zero latent",
    "shuffled_latent": "shuffled latent",
    "latent_free": "latent, no price",
    "discrete_free": "discrete, no price",
}


class RunNotFound(FileNotFoundError):
    """The path given is no run directory; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything the report needs of one run, read once."""

    path: Path
    label: str
    """Short and unique among the runs of one report."""
    recipe: Mapping[str, Any]
    """recipe.json; empty where it is missing or damaged."""
    manifest: Mapping[str, Any]
    metrics: Sequence[Metrics]
    finished: bool

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms in the order of the recipe, then whatever else the metrics name."""
        planned = section(self.recipe, "stages", "rl").get("arms") or ()
        seen = [line["arm"] for line in self.metrics if line["stage"] in ("rl", "evaluate", "arm") and line.get("arm")]
        return tuple(dict.fromkeys([*map(str, planned), *map(str, seen)]))

    def lines(self, stage: str, **equal: Any) -> list[Metrics]:
        """The metrics of one stage whose keys have the given values."""
        return [
            line
            for line in self.metrics
            if line["stage"] == stage and all(line.get(key) == want for key, want in equal.items())
        ]


def load_runs(run_dirs: Iterable[Path | str]) -> list[Run]:
    """Read run directories, each once, in the order given. Raises RunNotFound, and MetricsDamaged."""
    paths = list({Path(run_dir).resolve(): Path(run_dir) for run_dir in run_dirs}.values())
    if not paths:
        raise RunNotFound("no run directory given; name one or more, e.g. runs/tiny-cpu")
    for path in paths:
        _require_run(path)
    return [_load_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def section(recipe: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A section of the recipe, empty where any part of the way is missing."""
    value: Any = recipe
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing, damaged or something else (a report shows what there is)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def arm_title(arm: str) -> str:
    return ARM_TITLES.get(arm, arm)


def _load_run(path: Path, label: str) -> Run:
    metrics_path = path / "metrics.jsonl"
    metrics = read_metrics(metrics_path) if metrics_path.exists() else []
    return Run(
        path=path,
        label=label,
        recipe=read_json(path / "recipe.json"),
        manifest=read_json(path / "manifest.json"),
        metrics=[line for line in metrics if isinstance(line.get("stage"), str)],
        finished=(path / "done.json").exists(),
    )


def _require_run(path: Path) -> None:
    if (path / "recipe.json").is_file() or (path / "metrics.jsonl").is_file():
        return
    if not path.exists():
        problem = f"{path} does not exist"
    elif not path.is_dir():
        problem = f"{path} is a file, not a run directory"
    else:
        problem = f"{path} is no run directory: it holds neither recipe.json nor metrics.jsonl"
    raise RunNotFound(f"{problem}. {_what_to_do(path)}")


def _what_to_do(path: Path) -> str:
    around = path if path.is_dir() else path.parent
    near = sorted(child.parent.name for child in around.glob("*/metrics.jsonl")) if around.is_dir() else []
    if near:
        return f"Runs in {around}: {', '.join(near[:8])}{' ...' if len(near) > 8 else ''}"
    return "Give a directory that `lrscale launch` made, e.g. runs/tiny-cpu"


def _labels(paths: Sequence[Path]) -> list[str]:
    """Directory names, with as many parents as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]
