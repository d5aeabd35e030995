"""What `evaluate`, `generate` and `reward` are pointed at: a run directory, a model folder, a hub id, a recipe."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lrscale.config.load import dump_recipe, load_recipe, read_recipe
from lrscale.launch.errors import ExitCode, LaunchError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_run(target: str) -> bool:
    """Whether the target is a run directory."""
    return (Path(target) / "recipe.json").is_file()


def require_target(target: str) -> None:
    """Raises LaunchError (7) if the target can be neither a folder nor a hub id nor a builtin model."""
    path = Path(target).expanduser()
    if path.is_dir() or target.startswith("builtin:"):
        return
    # runs/typo is written like a hub id, but runs/ is a folder here.
    beside = target.startswith((".", "/", "~")) or (path.parent != Path() and path.parent.is_dir())
    if path.exists() or beside or not _HUB_ID.fullmatch(target):
        reason = "is a file, not a folder" if path.exists() else "does not exist"
        raise LaunchError(
            f"{target} {reason}",
            code=ExitCode.NOT_FOUND,
            help="give a run directory (runs/NAME), a model folder, a hub id (organisation/name) or builtin:tiny",
        )


def require_export(run: Path, out: Path) -> None:
    """Raises LaunchError where `run` is no run directory, or `out` would overwrite something."""
    if not is_run(str(run)):
        raise LaunchError(
            f"{run} is no run directory", code=ExitCode.NOT_FOUND, help="give the folder that `lrscale launch` printed"
        )
    if out.exists():
        raise LaunchError(
            f"{out} exists already", code=ExitCode.USAGE, help="nothing is overwritten: name a new folder, or remove it"
        )


def model_of(target: str, arm: str | None) -> str:
    """The model to generate with: an arm's final model for a run directory, else the target itself.

    Raises:
        LaunchError: there is no such target, or the run has no such model yet.
    """
    require_target(target)
    if not is_run(target):
        if arm is not None:
            message = f"--arm {arm} goes with a run directory, {target} is none"
            raise LaunchError(message, code=ExitCode.USAGE, help="leave --arm out")
        return target
    folder = Path(target) / "models"
    arms = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    chosen = arm or ("latent" if "latent" in arms else next(iter(arms), None))
    if chosen is None:
        raise LaunchError(
            f"{target} has no finished arm yet",
            code=ExitCode.NOT_FOUND,
            help=f"finish the run ({resuming(Path(target))}), or name a model folder",
        )
    if chosen not in arms:
        raise LaunchError(
            f"{target} has no model of the arm {chosen}",
            code=ExitCode.NOT_FOUND,
            help=f"--arm {' or --arm '.join(arms)}" if arms else "finish the run first",
        )
    return str(folder / chosen)


def resuming(run_dir: Path) -> str:
    """The command that goes on with this very run, from whatever folder.

    Raises:
        RecipeError: its recipe.json is damaged.
    """
    path = run_dir.resolve()
    words = ["lrscale", "launch", str(path / "recipe.json"), "--runs-dir", str(path.parent)]
    if read_recipe(path / "recipe.json").name != path.name:
        words += ["--name", path.name]
    return shlex.join(words)


@contextmanager
def evaluation_arguments(target: str, recipes: Sequence[str], overrides: Sequence[str]) -> Iterator[list[str]]:
    """The arguments of `lrscale.stages.evaluate`; a recipe that differs from the run's own lies in a temporary file.

    Raises:
        LaunchError: there is no such target.
        RecipeError: recipe or overrides are bad.
    """
    require_target(target)
    own = is_run(target)
    if own and not recipes and not overrides:
        yield [target]
        return
    paths = [str(Path(target) / "recipe.json")] if own and not recipes else recipes
    if not own:
        overrides = [*overrides, f"model.path={json.dumps(target)}"]
    recipe = load_recipe(paths, overrides).recipe
    with tempfile.TemporaryDirectory(prefix="lrscale-") as folder:
        path = Path(folder) / "recipe.json"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        yield [target, "--recipe-json", str(path)]


@contextmanager
def reward_arguments(recipes: Sequence[str], overrides: Sequence[str], rollouts: Path) -> Iterator[list[str]]:
    """The arguments of `lrscale.stages.score`; a run directory stands for its recipe.

    Raises:
        LaunchError: there is no such file of rollouts.
        RecipeError: recipe or overrides are bad.
    """
    if not rollouts.is_file():
        raise LaunchError(
            f"no such file: {rollouts}",
            code=ExitCode.NOT_FOUND,
            help="a run keeps rollouts in its folder rollouts/ (stages.rl.save_rollouts_every)",
        )
    paths = [str(Path(name) / "recipe.json") if is_run(name) else name for name in recipes]
    if len(paths) == 1 and is_run(recipes[0]) and not overrides:
        yield [paths[0], str(rollouts)]
        return
    recipe = load_recipe(paths, overrides).recipe
    with tempfile.TemporaryDirectory(prefix="lrscale-") as folder:
        path = Path(folder) / "recipe.json"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        yield [str(path), str(rollouts)]
