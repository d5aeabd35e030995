"""The run directory: made once, never overwritten, resumed only by the recipe it was made for."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrscale.config.errors import RecipeError
from lrscale.config.load import dump_recipe, flatten, read_recipe
from lrscale.config.recipe import Recipe
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.manifest import build_manifest

RunState = Literal["new", "unfinished", "finished"]
_CHANGEABLE = ("name", "report.", "parallel.", "cluster.", "checkpoints.")
"""Keys that a run may change on its way: its checkpoints fit any engine and any number of ranks."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run directory and what became of its run so far."""

    path: Path
    state: RunState
    changes: tuple[str, ...] = ()
    """What the recipe changes in the directory's recipe.json, allowed and not yet written."""

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def inspect_run(recipe: Recipe, runs_dir: Path) -> RunDir:
    """The run directory of a recipe, nothing written.

    Raises:
        LaunchError: the directory belongs to a begun run with another recipe, is no run directory, or its run is
            going on right now.
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
    changes = _allowed_changes(recipe, path)
    if (path / "done.json").is_file():
        return RunDir(path, "finished")
    require_free(path)
    return RunDir(path, "unfinished", changes)


def create_run(recipe: Recipe, runs_dir: Path, command: Sequence[str]) -> RunDir:
    """The run directory of a recipe, made if it is not there yet; its recipe.json replaced where that is allowed.

    Raises:
        LaunchError: as `inspect_run`, or the directory cannot be written.
    """
    run = inspect_run(recipe, runs_dir)
    if run.state != "new" and not run.changes:
        return run
    try:
        if run.changes:
            _replace_recipe(recipe, run.path, command)
        else:
            run.path.mkdir(parents=True, exist_ok=True)
            _write_once(run.path / "manifest.json", _manifest(recipe, command))
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
    differences = _differences(_former(run.path), recipe)
    if differences:
        raise _another_recipe(run.path, differences)
    return run


def has_begun(path: Path) -> bool:
    """Whether the run has made anything that depends on its recipe. An empty metrics.jsonl is nothing."""
    metrics = path / "metrics.jsonl"
    made = any((path / name).exists() for name in ("done.json", "traces", "checkpoints"))
    return made or (metrics.is_file() and metrics.stat().st_size > 0)


def _replace_recipe(recipe: Recipe, path: Path, command: Sequence[str]) -> None:
    """Under the worker's lock, so that no run changes its recipe on the way."""
    with _held(path):
        _allowed_changes(recipe, path)
        if not has_begun(path):
            write_whole(path / "manifest.json", _manifest(recipe, command))
        write_whole(path / "recipe.json", dump_recipe(recipe))


def _manifest(recipe: Recipe, command: Sequence[str]) -> str:
    return json.dumps(build_manifest(recipe, command), indent=2) + "\n"


def _is_leftover(path: Path) -> bool:
    """Whether a file may lie in a folder whose creation was cut short."""
    return path.name == "manifest.json" or path.suffix == ".tmp"


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by a whole one or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _allowed_changes(recipe: Recipe, path: Path) -> tuple[str, ...]:
    """What differs from the directory's recipe: anything until the run has made something, then only where it runs
    and what it reports.

    Raises:
        LaunchError: naming the differences that are not allowed.
    """
    differences = _differences(_former(path), recipe)
    refused = {key: text for key, text in differences.items() if not key.startswith(_CHANGEABLE)}
    if refused and has_begun(path):
        raise _another_recipe(path, refused)
    return tuple(differences.values())


def _former(path: Path) -> Recipe:
    try:
        return read_recipe(path / "recipe.json")
    except RecipeError as error:
        raise LaunchError(
            f"{path} holds a recipe that this lrscale cannot read",
            code=ExitCode.BAD_RECIPE,
            place=str(error),
            help="begin a new run with --name NAME; the old one is left as it is",
        ) from error


def _another_recipe(path: Path, differences: dict[str, str]) -> LaunchError:
    return LaunchError(
        f"{path} belongs to a run with another recipe",
        code=ExitCode.BAD_RECIPE,
        place="\n".join(differences.values()),
        help="begin a new run with --name NAME (or --set name=NAME), or give the old values to go on",
    )


def _differences(former: Recipe, recipe: Recipe) -> dict[str, str]:
    """By key, in words."""
    old, new = flatten(former), flatten(recipe)
    return {
        key: f"{key}: {_shown(old, key)} there, {_shown(new, key)} now"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key) or (key in old) != (key in new)
    }


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "nothing"


def require_free(path: Path) -> None:
    """Raises LaunchError (75) while a worker holds the run's lock. The lock is taken and given back."""
    if (path / "lock").is_file():
        with _held(path, "r", fcntl.LOCK_SH):
            pass


@contextmanager
def _held(path: Path, mode: str = "a+", kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the run's lock; LaunchError (75) while a worker does."""
    lock = path / "lock"
    with lock.open(mode, encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LaunchError(
                f"{path} is in use: {_holder(file.read())}",
                code=ExitCode.TRY_LATER,
                place=str(lock),
                help="wait until it ends, or begin another run with --name NAME",
            ) from None
        yield


def _holder(text: str) -> str:
    """Who holds the lock, in words, from what the worker wrote into it."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on host {holder['host']} runs it"
    except (ValueError, TypeError, KeyError):
        return " ".join(text.split()) or "another process runs it"


def describe(run: RunDir, *, dry: bool = False) -> str:
    """What a launch does with this run (`dry`: would do), and under it what changes in recipe.json."""
    if run.state == "finished":
        where = f"read {run.report}" if run.report.is_file() else "it has no report: lrscale report " + str(run.path)
        return f"{run.path} is finished; {where}"
    new = run.state == "new" or not has_begun(run.path)
    if dry:
        doing, replaced = "would begin" if new else "would go on with", "would be replaced"
    else:
        doing, replaced = "beginning" if new else "going on with", "is replaced"
    why = "nothing was made by it yet" if new else "the run goes on from its last checkpoint"
    changes = [f"its recipe {replaced}, {why}:", *run.changes] if run.changes else []
    return "\n  ".join([f"{doing} {run.path}", *changes])


def after_failure(run: RunDir, code: int, command: Sequence[str]) -> str:
    """What to do when the worker ended early."""
    resume = f"resume with: {shlex.join(['lrscale', *command])}"
    if code in (ExitCode.INTERRUPTED, 143):
        return f"interrupted; {resume}"
    if code == ExitCode.TRY_LATER:
        return f"another process has taken {run.path}; try again when it has ended"
    ended = f"the run ended early (exit code {code})\n  logs: {run.path / 'attempts' / 'latest'}"
    # A recipe that does not work does not work twice; the worker has said what to mend.
    return ended if code == ExitCode.BAD_RECIPE else f"{ended}\n  {resume}"
