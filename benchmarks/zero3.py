"""ZeRO-3 on this machine's CPU: bytes a rank, step time beside plain data parallel, gathering whole parameters.

    python -m benchmarks.zero3

starts 1, 2 and 4 ranks over gloo and prints three tables. Bytes are counted from the live tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.models import random_policy
from lrscale.config.recipe import Recipe
from lrscale.config.shipped import shipped_ds_configs
from lrscale.latent import LatentPolicy
from lrscale.launch.job import free_port
from lrscale.parallel.build import build_engine
from lrscale.parallel.engine import GROUPS, Engine
from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.start import start_process_group, stop_process_group
from lrscale.plan.deepspeed import resolve

HIDDEN, LAYERS = 256, 6
ROWS, TOKENS = 4, 128
"""Of each rank's batch."""
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7, help="timed steps, after two that are not")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.ranks, options.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        policy = random_policy(hidden=HIDDEN, layers=LAYERS)
        policy.save_pretrained(folder)
        print(f"policy and projector: {sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters, float32")
        found = {ranks: launch(folder, ranks, options.steps) for ranks in (1, 2, 4)}
    print_bytes(found)
    two = found[2]
    print(f"\nupdate of {ROWS} x {TOKENS} tokens a rank on 2 ranks, median of {options.steps}, one thread a rank")
    for name in ("plain data parallel", "zero3"):
        print(
            f"  {name:22s}{two['step_s'][name]:8.3f} s   {two['step_s'][name] / two['step_s']['plain data parallel']:5.2f} x"
        )
    print("\nfull_parameters() on 2 ranks, median of 5")
    for name, seconds in two["gather_s"].items():
        print(f"  {name:22s}{seconds:8.3f} s   {seconds / two['gather_s']['one by one']:5.2f} x")


def print_bytes(found: dict[int, dict[str, Any]]) -> None:
    """MiB on the rank that holds most, and against an exact share of what one rank holds."""
    kept = found[2]["persistent"]
    print(f"\nMiB a rank (tensors that stay whole on every rank, {kept / MIB:.2f} MiB, are left out)")
    print(f"{'ranks':>7s}" + "".join(f"{kind:>28s}" for kind in found[1]["bytes"]))
    for ranks, result in found.items():
        cells = [
            f"{count / MIB:.2f} ({ranks * count / found[1]['bytes'][kind]:.3f} of 1/N)"
            for kind, count in result["bytes"].items()
        ]
        print(f"{ranks:7d}" + "".join(f"{cell:>28s}" for cell in cells))


def launch(folder: str, ranks: int, steps: int) -> dict[str, Any]:
    """The main rank's findings."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.zero3",
        "--worker",
        folder,
        "--ranks",
        str(ranks),
        "--steps",
        str(steps),
    ]
    if ranks > 1:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        start += ["--num_processes", str(ranks), "--mixed_precision", "no", "--dynamo_backend", "no"]
        command = [*start, "--main_process_port", str(free_port()), *command[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(folder: Path, ranks: int, steps: int) -> None:
    """One rank: prints what the main one found."""
    parallel = {"kind": "zero3", "ranks_per_node": ranks, "threads": 1}
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(folder), "device": "cpu"},
            "projector": {"kind": "normalised"},
            "parallel": parallel,
        }
    )
    lockstep = Lockstep(start_process_group(recipe))
    torch.set_num_threads(1)
    template = json.loads(shipped_ds_configs()["zero3"].read_text())
    engine = build_engine(recipe, lockstep, resolve(template, recipe, HIDDEN, ranks))
    generator = torch.Generator().manual_seed(lockstep.ranks.rank)
    ids = torch.randint(60, 90, (ROWS, TOKENS), generator=generator)
    result: dict[str, Any] = {"step_s": {"zero3": timed(lambda: sharded_step(engine, ids), steps, lockstep)}}
    projector_step(engine, ids)
    result["bytes"] = {kind: max(lockstep.gather_json(count)) for kind, count in bytes_of(engine).items()}
    result["persistent"] = sum(p.nbytes for p in engine.policy.parameters() if p.ds_persist)
    if ranks == 2:
        result["step_s"]["plain data parallel"] = timed(plain_step(folder, ids, ranks), steps, lockstep)
        result["gather_s"] = gathering(engine, lockstep)
    if lockstep.ranks.is_main:
        print(json.dumps(result))
    stop_process_group()


def loss_of(policy: LatentPolicy, ids: Tensor, ranks: int) -> Tensor:
    out = policy.replay(ids, torch.ones_like(ids), [policy.model.lm_head.weight.new_zeros(0, HIDDEN)] * ROWS)
    return -policy.token_logprobs(out.hidden_BTH, ids).mean() / ranks


def sharded_step(engine: Engine, ids: Tensor) -> None:
    with engine.training("base"):
        engine.backward(loss_of(engine.policy, ids, engine.ranks.world_size))
        engine.step("base", learning_rate=1e-5, max_grad_norm=1.0)


def projector_step(engine: Engine, ids: Tensor) -> None:
    """So that the projector has its moments too."""
    with engine.training("projector"):
        hidden = engine.policy.backbone.embed(ids)
        engine.backward(engine.policy.projector(hidden).pow(2).mean())
        engine.step("projector", learning_rate=1e-5, max_grad_norm=1.0)


def plain_step(folder: Path, ids: Tensor, ranks: int) -> Callable[[], None]:
    """The same update with whole weights on every rank and gradients summed in one all-reduce."""
    policy = LatentPolicy.from_pretrained(folder)
    parameters = list(policy.model.parameters())
    adamw = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        loss_of(policy, ids, ranks).backward()
        flat = torch.cat([parameter.grad.view(-1) for parameter in parameters])
        dist.all_reduce(flat)
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad()

    return step


def timed(step: Callable[[], None], steps: int, lockstep: Lockstep) -> float:
    """Median wall seconds, all ranks waiting for each other in between."""
    seconds = []
    for number in range(steps + 2):
        lockstep.barrier()
        started = time.perf_counter()
        step()
        lockstep.barrier()
        if number > 1:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def gathering(engine: Engine, lockstep: Lockstep) -> dict[str, float]:
    """Seconds to see every parameter whole once, by size of the bucket."""

    def walk() -> None:
        for _ in engine.full_parameters():
            pass

    found = {}
    for name, size in (("one by one", 1), ("buckets of 32 MiB", 32 * MIB), ("buckets of 256 MiB", 256 * MIB)):
        engine.gather_bytes = size
        found[name] = timed(walk, 5, lockstep)
    return found


def bytes_of(engine: Engine) -> dict[str, int]:
    """Of what ZeRO-3 shards, on this rank; tensors that stay whole are left out."""
    counts = {"parameters": 0, "gradients": 0, "optimizer": 0}
    for parameter in engine.policy.parameters():
        if not parameter.ds_persist:
            counts["parameters"] += parameter.ds_tensor.nbytes
    for group in GROUPS:
        optimizer = engine._engines[group].optimizer
        counts["gradients"] += optimizer.grad_partitions_flat_buffer.nbytes
        states = optimizer.optimizer.state.values()
        counts["optimizer"] += sum(value.nbytes for state in states for value in state.values() if value.dim())
    return counts


if __name__ == "__main__":
    main()
