"""Run directories by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from lrscale.launch.errors import ExitCode, LaunchError


def find_run(run: str, runs_dir: Path) -> Path:
    """A run directory by its path, or by its name in `runs_dir`.

    Raises:
        LaunchError: it is neither (7).
    """
    for path in (Path(run).expanduser(), runs_dir / run):
        if (path / "recipe.json").is_file():
            return path
    names = [path.name for path in all_runs(runs_dir)]
    near = difflib.get_close_matches(Path(run).name, names, n=3, cutoff=0.5)
    there = f"did you mean {' or '.join(near)}?" if near else f"runs in {runs_dir}: {', '.join(names[:8]) or 'none'}"
    what = "is no run directory (it has no recipe.json)" if Path(run).is_dir() else "is no run"
    raise LaunchError(f"{run} {what}", code=ExitCode.NOT_FOUND, help=f"{there}; another folder: --runs-dir FOLDER")


def all_runs(runs_dir: Path) -> list[Path]:
    """The run directories in a folder, the one that was written to last first."""
    found = [path.parent for path in runs_dir.glob("*/recipe.json")]
    return sorted(found, key=touched, reverse=True)


def touched(run_dir: Path) -> float:
    """Unix time of the last sign of life in a run's folder."""
    paths = [run_dir / name for name in ("recipe.json", "metrics.jsonl", "jobs.jsonl", "done.json", "attempts/latest")]
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)
