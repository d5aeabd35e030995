"""CPU seconds of commands that a login node runs: help must stay under 0.3, the plan of 70B under a second.

python -m benchmarks.cli_startup
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile

RUNS = 5


def cpu_seconds(command: list[str], folder: str) -> float:
    """User and system time of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main() -> None:
    """Print a table: command, median and worst of five runs, limit."""
    print(f"{'command':<42} {'median s':>9} {'worst s':>9} {'limit':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for command, limit_s in {
            "--help": 0.3,
            "launch --help": 0.3,
            "show": 1.0,
            "launch --dry-run": 1.0,
            "launch llama3-70b-8n8g --dry-run": 1.0,
            "list": 1.0,
        }.items():
            times = [cpu_seconds([sys.executable, "-m", "lrscale.cli", *command.split()], folder) for _ in range(RUNS)]
            print(f"{'lrscale ' + command:<42} {statistics.median(times):>9.3f} {max(times):>9.3f} {limit_s:>7}")


if __name__ == "__main__":
    main()
