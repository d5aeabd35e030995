"""The plan's bytes against what DeepSpeed ZeRO-3 allocates and what a checkpoint takes on disk.

    python -m benchmarks.plan_against_reality

builds policies of 1, 25 and 120 M parameters on 1, 2 and 4 ranks of this machine's CPU, trains one step of base and
projector, counts the live tensors and the files, and prints them beside the plan's figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import random_policy
from lrscale.config.recipe import Recipe
from lrscale.config.shipped import shipped_ds_configs
from lrscale.launch.job import free_port
from lrscale.plan.checkpoint_bytes import checkpoint_bytes
from lrscale.plan.deepspeed import resolve
from lrscale.plan.model_dims import ModelDims, read_dims
from lrscale.plan.states import rank_states, zero_settings

MODELS = {"1M": (128, 4), "25M": (512, 6), "120M": (1024, 7)}
"""Hidden width and layers."""
_WANTED = "wanted.json"
EVERYTHING = tuple((model, dtype) for model in MODELS for dtype in ("float32", "bfloat16"))


@dataclass(frozen=True)
class Compared:
    """One figure: what was planned and what is there, in bytes."""

    model: str
    dtype: str
    ranks: int
    what: str
    planned: int
    real: int

    @property
    def error(self) -> float:
        return self.planned / self.real - 1 if self.real else float(self.planned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    print(f"{'model':>6s}{'dtype':>10s}{'ranks':>6s}  {'':14s}{'planned':>14s}{'real':>14s}{'error':>8s}")
    for ranks in (1, 2, 4):
        print(f"{ranks} ranks: a minute or two", file=sys.stderr)
        for one in compare(EVERYTHING, ranks):
            print(
                f"{one.model:>6s}{one.dtype:>10s}{one.ranks:6d}  {one.what:14s}{one.planned:14,d}{one.real:14,d}"
                f"{one.error:8.2%}",
                flush=True,
            )


def compare(wanted: Sequence[tuple[str, str]], ranks: int, timeout_s: float = 900) -> list[Compared]:
    """Plan and reality of these models and dtypes, on so many ranks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / _WANTED).write_text(json.dumps(wanted), encoding="utf-8")
        for model in dict(wanted):
            hidden, layers = MODELS[model]
            random_policy(hidden=hidden, layers=layers).save_pretrained(folder / model)
        found = []
        for entry in _launch(folder, ranks, timeout_s):
            recipe = _recipe(folder / entry["model"], entry["dtype"], ranks)
            dims = read_dims(json.loads((folder / entry["model"] / "config.json").read_text()))
            for what, planned in _planned(recipe, dims, ranks).items():
                found.append(Compared(entry["model"], entry["dtype"], ranks, what, planned, entry[what]))
        return found


def _planned(recipe: Recipe, dims: ModelDims, ranks: int) -> dict[str, int]:
    states = rank_states(recipe, dims, ranks, zero_settings(dims.hidden))
    return {
        "weights": states.weights,
        "gradients": states.gradients,
        "masters": states.masters,
        "moments": states.moments,
        "states": states.states,
        "persistent": states.persistent,
        "buckets": states.buckets,
        "checkpoint": checkpoint_bytes(recipe, dims, ranks),
    }


def _recipe(model: Path, dtype: str, ranks: int) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(model), "device": "cpu", "dtype": dtype},
            "projector": {"kind": "normalised"},
            "parallel": {"kind": "zero3", "ranks_per_node": ranks, "threads": 1},
        }
    )


def _launch(folder: Path, ranks: int, timeout_s: float) -> list[dict[str, Any]]:
    """What the main rank reported, a model and dtype each."""
    command = [sys.executable, "-m", "benchmarks.plan_against_reality", "--worker", str(folder)]
    if ranks > 1:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        start += ["--num_processes", str(ranks), "--mixed_precision", "no", "--dynamo_backend", "no"]
        command = [*start, "--main_process_port", str(free_port()), *command[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout_s)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"model"')]


def work(folder: Path) -> None:
    """One rank: builds, trains and saves each model; the main one reports the bytes of the rank that holds most."""
    import torch

    from lrscale.parallel.lockstep import Lockstep
    from lrscale.parallel.ranks import Ranks
    from lrscale.parallel.start import start_process_group, stop_process_group

    wanted = json.loads((folder / _WANTED).read_text(encoding="utf-8"))
    ranks = Ranks.from_environment()
    lockstep = Lockstep(start_process_group(_recipe(folder / wanted[0][0], wanted[0][1], ranks.world_size)))
    torch.set_num_threads(1)
    for model, dtype in wanted:
        found = _measured(folder, model, dtype, lockstep)
        if lockstep.ranks.is_main:
            print(json.dumps({"model": model, "dtype": dtype, **found}), flush=True)
    stop_process_group()


def _measured(folder: Path, model: str, dtype: str, lockstep: Any) -> dict[str, int]:
    import shutil

    import torch

    from lrscale.parallel.build import build_engine
    from lrscale.parallel.checkpoint import CheckpointStore

    ranks = lockstep.ranks.world_size
    recipe = _recipe(folder / model, dtype, ranks)
    template = json.loads(shipped_ds_configs()["zero3"].read_text())
    hidden = MODELS[model][0]
    engine = build_engine(recipe, lockstep, resolve(template, recipe, hidden, ranks))
    ids = torch.randint(60, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    with engine.training("base"):
        rows = [torch.zeros(0, hidden)] * 2
        out = engine.policy.replay(ids, torch.ones_like(ids), rows)
        engine.backward(-engine.policy.token_logprobs(out.hidden_BTH, ids).mean() / ranks)
        engine.step("base", learning_rate=1e-5, max_grad_norm=1.0)
    with engine.training("projector"):
        engine.backward(engine.policy.projector(engine.policy.backbone.embed(ids)).pow(2).mean())
        engine.step("projector", learning_rate=1e-5, max_grad_norm=1.0)
    found = {what: max(lockstep.gather_json(count)) for what, count in _allocated(engine).items()}
    saved = CheckpointStore(folder / f"ck-{model}-{dtype}", lockstep=lockstep).save("step-1", engine, {"step": 1})
    found["checkpoint"] = lockstep.on_main(lambda: sum(path.stat().st_size for path in saved.iterdir()))
    lockstep.on_main(lambda: shutil.rmtree(saved.parent))
    return found


def _allocated(engine: Any) -> dict[str, int]:
    """Bytes of the live tensors of this rank, each storage once."""
    from lrscale.parallel.engine import GROUPS

    counts = dict.fromkeys(("weights", "gradients", "masters", "moments", "persistent", "buckets"), 0)
    for parameter in engine.policy.parameters():
        counts["weights"] += parameter.ds_tensor.nbytes
        counts["persistent"] += parameter.nbytes if parameter.ds_persist else 0
    for group in GROUPS:
        optimizer = engine._engines[group].optimizer
        counts["gradients"] += optimizer.grad_partitions_flat_buffer.nbytes
        weights = {flat.data_ptr() for flat in optimizer.fp16_partitioned_groups_flat}
        counts["masters"] += sum(
            m.nbytes for m in optimizer.fp32_partitioned_groups_flat if m.data_ptr() not in weights
        )
        states = optimizer.optimizer.state.values()
        counts["moments"] += sum(value.nbytes for state in states for value in state.values() if value.dim())
        counts["buckets"] += sum(bucket.buffer.nbytes for bucket in optimizer.ipg_buckets.values())
    counts["states"] = sum(counts[what] for what in ("weights", "gradients", "masters", "moments"))
    return counts


if __name__ == "__main__":
    main()
