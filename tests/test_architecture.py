"""The rules of the house that no linter knows: layers, sizes of files, and a control plane without torch."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import lrscale.config
import lrscale.launch
import lrscale.plan

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("lrscale", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 400


def test_layers_hold() -> None:
    """Locks out an import against the layers, the runtime under the CLI above all."""
    code = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True, is_debug_mode=False))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def control_plane() -> list[str]:
    found = [
        module.name
        for package in (lrscale.config, lrscale.launch, lrscale.plan)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    ]
    return ["lrscale.cli", *found]


def test_control_plane_leaves_torch_out() -> None:
    """Locks out a `lrscale launch` that takes seconds on a login node because something pulled torch in."""
    heavy = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "numpy", "matplotlib")
    code = (
        f"import importlib, sys\nfor name in {control_plane()!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_help_imports_no_pydantic() -> None:
    """Locks out a slow `lrscale --help`: what commands need is imported inside them."""
    code = "import lrscale.cli, sys; print(*[name for name in ('pydantic', 'yaml', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in SOURCES
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_files_are_nouns() -> None:
    """Locks out the drawers into which everything goes."""
    drawers = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
    assert not [str(path.relative_to(ROOT)) for path in SOURCES if path.name in drawers]


def _imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_only_parallel_imports_the_engines() -> None:
    """Locks out sharding details inside the method; lazy imports inside functions count."""
    guilty = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "lrscale").rglob("*.py")
        if path.relative_to(ROOT / "lrscale").parts[0] != "parallel"
        and _imported(ast.parse(path.read_text())) & {"accelerate", "deepspeed"}
    ]
    assert not guilty


def test_programs_are_started_in_few_places() -> None:
    """Locks out children that nobody ends: beside the launcher only rollout engines are programs, all in one file."""
    starters = {
        path.relative_to(ROOT / "lrscale").as_posix()
        for path in (ROOT / "lrscale").rglob("*.py")
        if "subprocess" in _imported(ast.parse(path.read_text()))
    }
    assert {name for name in starters if not name.startswith("launch/")} == {"rollout/vllm/process.py"}


def _reads_environment(tree: ast.AST) -> bool:
    names = {"environ", "environb", "getenv"}
    return any(
        (
            isinstance(node, ast.Attribute)
            and node.attr in names
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        )
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names})
        for node in ast.walk(tree)
    )


def test_one_file_reads_the_environment() -> None:
    """Locks out settings that no recipe shows, however os.environ is spelled."""
    readers = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lrscale").rglob("*.py")
        if _reads_environment(ast.parse(path.read_text()))
    ]
    assert readers in ([], ["lrscale/parallel/ranks.py"])
