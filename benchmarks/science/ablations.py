"""What a projector needs to pass gate 3: one change at a time. `python -m benchmarks.science.ablations` prints the table.

Each line is a run of traces and projector SFT only, on the shipped base, then three measures: the held-out loss after
markers with real, no and shuffled latents; the accuracy with whole stories forced into latent steps, the same three
ways. Seeds differ from those of run.py. Finished runs are kept; a variant that cannot be trained is told as such.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.science.forced import forced_accuracy
from lrscale.latent import LatentPolicy
from lrscale.launch.errors import ExitCode
from lrscale.report.runs import load_runs
from lrscale.report.summary import heldout_losses

SFT = "stages.projector_sft"
VARIANTS: dict[str, list[str]] = {
    "as in tiny-cpu": [],
    "paper's projector (no norm), aligned": ["projector.kind=paper"],
    "not aligned, 1 epoch of SFT at 1e-4 (the paper's)": [f"{SFT}.alignment.epochs=0"],
    "not aligned, 3 epochs at 1e-3": [
        f"{SFT}.alignment.epochs=0",
        f"{SFT}.epochs=3",
        f"{SFT}.learning_rate=1e-3",
    ],
    "paper's projector, not aligned": ["projector.kind=paper", f"{SFT}.alignment.epochs=0"],
    "aligned for 5 epochs": [f"{SFT}.alignment.epochs=5"],
    "aligned, 1 layer": ["projector.layers=1"],
    "aligned, hardly any SFT": [f"{SFT}.max_steps=1"],
    "a marker a sentence in training": ["stages.traces.merge_neighbours=false"],
    "ratios of the paper (0.10, 0.25)": ["stages.traces.replace_ratios=[0.10, 0.25]"],
    "a quarter of the traces": ["stages.traces.prompts=48"],
    "residual projector, aligned": ["projector.kind=residual"],
    "aligned, SFT with distillation of hidden states": [f"{SFT}.distillation=1.0"],
    "not aligned, 3 epochs at 1e-3 with distillation": [
        f"{SFT}.alignment.epochs=0",
        f"{SFT}.epochs=3",
        f"{SFT}.learning_rate=1e-3",
        f"{SFT}.distillation=1.0",
    ],
}
MODES = ("real", "zero", "shuffled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--stories", type=int, default=500)
    parser.add_argument("--only", type=int, nargs="+", default=range(len(VARIANTS)), help="numbers of variants, from 0")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to lrscale launch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("projector", box=None)
    for name in ("held-out loss real / zero / shuffled", "forced into latents, accuracy %: real / zero / shuffled"):
        table.add_column(name, justify="right")
    console = Console(width=150, highlight=False)
    for number, (name, overrides) in enumerate(VARIANTS.items()):
        if number not in options.only:
            continue
        run = options.runs_dir / f"{number:02d}-seed-{options.seed}"
        code = launch(run, [f"seed={options.seed}", "stages.run=[traces, projector_sft]", *options.set, *overrides])
        if code == ExitCode.INTERRUPTED:
            return code
        if code:  # a variant that cannot be trained is a finding
            table.add_row(name, f"did not train (exit code {code})", f"see {run}/attempts/latest")
        else:
            table.add_row(name, *measured(run, options.stories, options.seed))
        console.print(table)  # again after each line: an interrupted benchmark has shown what it found
    return 0


def launch(run: Path, overrides: list[str]) -> int:
    command = [sys.executable, "-m", "lrscale", "launch", "tiny-cpu", "--runs-dir", str(run.parent), "--name", run.name]
    for override in overrides:
        command += ["--set", override]
    return subprocess.run(command, check=False, stdout=sys.stderr).returncode


def measured(run: Path, stories: int, seed: int) -> tuple[str, str]:
    """The two cells of a variant, kept in the run's folder."""
    kept = run / "forced.json"
    if not kept.is_file():
        policy = LatentPolicy.from_pretrained(run / "models" / "projector_sft")
        accuracies = {mode: forced_accuracy(policy, mode, stories=stories, seed=seed).accuracy for mode in MODES}
        kept.write_text(json.dumps(accuracies))
    forced = json.loads(kept.read_text())
    (loss,) = heldout_losses(load_runs([run])[0])
    losses = f"{loss.loss_real:.3f} / {loss.loss_zero:.3f} / {loss.loss_shuffled:.3f}"
    return losses, " / ".join(f"{100 * forced[mode]:.1f}" for mode in MODES)


if __name__ == "__main__":
    sys.exit(main())
