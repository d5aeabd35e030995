"""The demo with several seeds: what the README may claim of it. `python -m benchmarks.tiny_demo` prints the table.

Runs launchers/tiny-cpu.yaml once a seed through the command line, as a user would, and prints mean and range over
the seeds. Finished runs are kept and not run again; an interrupted benchmark goes on where it stood.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from lrscale.report.table import print_summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/tiny_demo"))
    parser.add_argument("--set", action="append", default=[], help="passed on to lrscale launch")
    options = parser.parse_args()
    run_dirs = []
    for seed in options.seeds:
        name = f"seed-{seed}"
        command = [sys.executable, "-m", "lrscale", "launch", "--runs-dir", str(options.runs_dir), "--name", name]
        for override in (f"seed={seed}", *options.set):
            command += ["--set", override]
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
        run_dirs.append(options.runs_dir / name)
    print_summary(run_dirs, Console(width=160, highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
