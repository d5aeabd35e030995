"""plan.json of a run directory: what was planned, for its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrscale.config.errors import RecipeError
from lrscale.config.hardware import load_machine
from lrscale.config.load import LoadedRecipe
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.job import dims_of
from lrscale.launch.planning import plan_of
from lrscale.launch.rundir import write_whole
from lrscale.plan.run_file import charted_values

PLAN = "plan.json"


def keep_own_plan(loaded: LoadedRecipe, run_dir: Path) -> None:
    """The plan of a run that is submitted, unless somebody has put one there.

    None for CPUs and for models whose dimensions are not known here.
    """
    known = loaded.recipe.model.device != "cpu" and dims_of(loaded.recipe.model.path) is not None
    if not known or (run_dir / PLAN).exists():
        return
    try:
        values = charted_values(plan_of(loaded, load_machine()))
    except RecipeError:  # what cannot be planned may be launched all the same
        return
    keep_plan(run_dir, values)


def plan_json(values: Mapping[str, Any]) -> str:
    """Without Infinity and NaN, which are no JSON. LaunchError where constants are so large or small that there are any."""
    try:
        return json.dumps(values, allow_nan=False)
    except ValueError as error:
        raise LaunchError(
            "some number of the plan is not finite",
            code=ExitCode.USAGE,
            help="leave out constants that no machine has (--constant, --hardware)",
        ) from error


def keep_plan(folder: Path, values: Mapping[str, Any]) -> Path:
    """Put a plan's numbers where its charts are. LaunchError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PLAN, plan_json(values) + "\n")
    except OSError as error:
        raise LaunchError(
            f"{folder / PLAN} cannot be written: {error.strerror}",
            code=ExitCode.PREFLIGHT,
            help="name a folder of yours",
        ) from error
    return folder / PLAN
