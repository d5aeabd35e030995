"""The run directory: made once, never overwritten, resumed only by the recipe it was made for."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrscale.config.errors import RecipeError
from lrscale.config.load import dump_recipe, flatten, read_recipe
from lrscale.config.recipe import Recipe
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.manifest import build_manifest

RunState = Literal["new", "unfinished", "finished"]


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run directory and what became of its run so far."""

    path: Path
    state: RunState

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def inspect_run(recipe: Recipe, runs_dir: Path) -> RunDir:
    """The run directory of a recipe, nothing written.

    Raises:
        LaunchError: the directory belongs to another recipe, is no run directory, or its run is going on right now.
    """
    path = runs_dir / recipe.name
    if not path.exists():
        return RunDir(path, "new")
    if not (path / "recipe.json").is_file():
        if path.is_dir() and all(_is_leftover(child) for child in path.iterdir()):
            return RunDir(path, "new")
        raise LaunchError(
            f"{path} exists and is no run directory (it has no recipe.json)",
            code=ExitCode.PREFLIGHT,
            help="choose another name: --name NAME, or another folder: --runs-dir FOLDER",
        )
    _require_same_recipe(recipe, path)
    if (path / "done.json").is_file():
        return RunDir(path, "finished")
    require_free(path)
    return RunDir(path, "unfinished")


def create_run(recipe: Recipe, runs_dir: Path, command: Sequence[str]) -> RunDir:
    """The run directory of a recipe, made if it is not there yet.

    Raises:
        LaunchError: as `inspect_run`, or the directory cannot be written.
    """
    run = inspect_run(recipe, runs_dir)
    if run.state != "new":
        return run
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        _write_once(run.path / "manifest.json", json.dumps(build_manifest(recipe, command), indent=2) + "\n")
        # Last, for it makes the folder a run directory.
        _write_once(run.path / "recipe.json", dump_recipe(recipe))
    except OSError as error:
        raise LaunchError(
            f"the run directory cannot be written: {error.strerror}",
            code=ExitCode.PREFLIGHT,
            place=str(error.filename or run.path),
            help="make room or rights there, or choose another folder: --runs-dir FOLDER",
        ) from error
    # Of two launches at the same moment the first one's recipe stands; the other has to agree with it.
    _require_same_recipe(recipe, run.path)
    return run


def _is_leftover(path: Path) -> bool:
    """Whether a file may lie in a folder whose creation was cut short."""
    return path.name == "manifest.json" or path.suffix == ".tmp"


def _write_once(path: Path, text: str) -> None:
    """Writes a whole file or none, and leaves one that is already there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _require_same_recipe(recipe: Recipe, path: Path) -> None:
    try:
        former = read_recipe(path / "recipe.json")
    except RecipeError as error:
        raise LaunchError(
            f"{path} holds a recipe that this lrscale cannot read",
            code=ExitCode.BAD_RECIPE,
            place=str(error),
            help="begin a new run with --name NAME; the old one is left as it is",
        ) from error
    differences = list(_differences(former, recipe))
    if differences:
        begun = (path / "metrics.jsonl").is_file() or (path / "traces").is_dir()
        unused = "" if begun else f"; nothing was made there yet, so you may also delete {path}"
        raise LaunchError(
            f"{path} belongs to a run with another recipe",
            code=ExitCode.BAD_RECIPE,
            place="\n".join(differences),
            help=f"begin a new run with --name NAME (or --set name=NAME), or give the old values to go on{unused}",
        )


def _differences(former: Recipe, recipe: Recipe) -> Iterator[str]:
    old, new = flatten(former), flatten(recipe)
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key) or (key in old) != (key in new):
            yield f"{key}: {_shown(old, key)} there, {_shown(new, key)} now"


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "nothing"


def require_free(path: Path) -> None:
    """Raises LaunchError (75) while a worker holds the run's lock. The lock is taken and given back."""
    lock = path / "lock"
    if not lock.is_file():
        return
    with lock.open("r", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"{path} is in use: {_holder(file.read())}",
                code=ExitCode.TRY_LATER,
                place=str(lock),
                help="wait until it ends, or begin another run with --name NAME",
            ) from None


def _holder(text: str) -> str:
    """Who holds the lock, in words, from what the worker wrote into it."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on host {holder['host']} runs it"
    except (ValueError, TypeError, KeyError):
        return " ".join(text.split()) or "another process runs it"


def describe(run: RunDir) -> str:
    """What a launch does with this run, in one line."""
    if run.state == "finished":
        where = f"read {run.report}" if run.report.is_file() else "it has no report: lrscale report " + str(run.path)
        return f"{run.path} is finished; {where}"
    return f"{'beginning' if run.state == 'new' else 'going on with'} {run.path}"


def after_failure(run: RunDir, code: int, command: Sequence[str]) -> str:
    """What to do when the worker ended early."""
    resume = f"resume with: {shlex.join(['lrscale', *command])}"
    if code in (ExitCode.INTERRUPTED, 143):
        return f"interrupted; {resume}"
    if code == ExitCode.TRY_LATER:
        return f"another process has taken {run.path}; try again when it has ended"
    return f"the run ended early (exit code {code})\n  logs: {run.path / 'attempts' / 'latest'}\n  {resume}"
