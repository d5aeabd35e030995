"""What can be known to go wrong, looked at before anything is loaded.

    python -m lrscale.stages preflight RUN_DIR --meet HOST PORT --node NAME --index K --nodes N
                                                          once on every node of a job, before its launchers
    python -m lrscale.stages preflight RUN_DIR            in every rank of a job, before its worker
    python -m lrscale.stages preflight --login [RECIPE]   on a login node; one JSON object a finding on stdout

In a job every node first calls the main one where the launchers will meet. Then each rank looks at its own node and GPU, the ranks then meet in the launcher's key-value store, look at
the folder and the network together, and the main rank tells all of them the verdict. It writes the findings to
attempts/latest/preflight.json, and nodes that are not fit to RUN_DIR/bad_nodes.txt. Exit codes: 0 fine, 2 usage,
3 the recipe cannot be read, 4 something failed, 7 no such run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lrscale.config.diagnosis import described, failed
from lrscale.config.errors import RecipeError
from lrscale.config.load import read_recipe
from lrscale.config.recipe import Recipe

BAD_RECIPE, FAILED, NOT_FOUND = 3, 4, 7


def main(arguments: list[str] | None = None) -> int:
    """Look, say what was found; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lrscale.stages preflight", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("path", type=Path, nargs="?", help="a run directory; with --login a recipe.json, or none")
    parser.add_argument("--login", action="store_true", help="look at what a login node can see")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="with --login: where the run will lie")
    parser.add_argument("--meet", nargs=2, metavar=("HOST", "PORT"), help="only whether all nodes reach the main one")
    parser.add_argument("--node", default="", help="with --meet: this node's name")
    parser.add_argument("--index", type=int, default=0, help="with --meet: its place in the job; 0 is the main one")
    parser.add_argument("--nodes", type=int, default=1, help="with --meet: how many there are")
    options = parser.parse_args(arguments)
    if options.login:
        return _login(options.path, options.runs_dir)
    if options.path is None:
        parser.error("needed: a run directory")
    if options.meet:
        return _meet(options)
    recipe = _read(options.path / "recipe.json")
    if isinstance(recipe, int):
        return recipe
    from lrscale.stages.preflight.nodes import look_together

    return 0 if look_together(recipe, options.path) else FAILED


def _meet(options: argparse.Namespace) -> int:
    from lrscale.stages.preflight.rendezvous import Place, meet
    from lrscale.stages.preflight.verdict import write_findings

    folder = options.path / "attempts" / "latest"
    host, port = options.meet
    place = Place(folder, options.node, options.index, options.nodes, host, int(port))
    checks = meet(place)
    if checks:
        print(described(checks), file=sys.stderr)
    if not failed(checks):
        return 0
    if place.index == 0:
        write_findings(options.path, folder, checks)
    return FAILED


def _login(path: Path | None, runs_dir: Path) -> int:
    recipe = _read(path) if path is not None else None
    if isinstance(recipe, int):
        return recipe
    from lrscale.stages.preflight.login import look_around

    for check in look_around(recipe, runs_dir):
        print(json.dumps(check.to_json()), flush=True)
    return 0


def _read(path: Path) -> Recipe | int:
    """The recipe, or the exit code that says why there is none."""
    if not path.is_file():
        print(f"error: {path} does not exist", file=sys.stderr)
        return NOT_FOUND
    try:
        return read_recipe(path)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return BAD_RECIPE
