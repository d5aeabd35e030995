"""CPU seconds of `lrscale --help`: must stay under 0.3, and without torch.

python -m benchmarks.cli_startup
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

LIMIT_S = 0.3
RUNS = 5


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main() -> None:
    """Print a table: command, median and worst of five runs."""
    print(f"{'command':<24} {'median s':>9} {'worst s':>9}   limit {LIMIT_S}")
    for name, arguments in {
        "lrscale --help": ["--help"],
        "lrscale launch --help": ["launch", "--help"],
        "lrscale show": ["show"],
        "lrscale launch --dry-run": ["launch", "--dry-run", "--runs-dir", "/nonexistent"],
    }.items():
        times = [cpu_seconds([sys.executable, "-m", "lrscale.cli", *arguments]) for _ in range(RUNS)]
        print(f"{name:<24} {statistics.median(times):>9.3f} {max(times):>9.3f}")


if __name__ == "__main__":
    main()
