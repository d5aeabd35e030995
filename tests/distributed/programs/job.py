"""What the programs of several ranks share: start, a live tiny policy on disk, uneven rows, one line of JSON."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lrscale.config.recipe import Recipe
from lrscale.latent import LatentPolicy
from lrscale.parallel.build import build_engine
from lrscale.parallel.engine import Engine
from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.ranks import Ranks

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 10**9,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 10**6,
        "stage3_prefetch_bucket_size": 10**6,
        "stage3_param_persistence_threshold": 0,
    },
}
"""Nothing persistent: tiny tensors would never be partitioned again otherwise, and nothing would be tested."""


def narrow(ds_config: dict[str, Any]) -> dict[str, Any]:
    """For bfloat16 weights: float32 masters, gradients accumulated and reduced in float32."""
    return {
        **ds_config,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def offloading(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Optimizer and parameters in CPU memory, as zero3_offload.json has them."""
    host = {"device": "cpu", "pin_memory": False}
    zero = {**ds_config["zero_optimization"], "offload_optimizer": host, "offload_param": host}
    return {**ds_config, "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero}


def start(timeout_s: float = 60) -> Lockstep:
    """Process group and lockstep of this rank."""
    import deepspeed
    import deepspeed.ops

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute, and nothing here needs it
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=timeout_s), verbose=False)
    return Lockstep(Ranks.from_environment(), timeout=timedelta(seconds=timeout_s))


def build(
    kind: str, folder: Path, lockstep: Lockstep, *, ds_config: dict[str, Any] | None = None, **model: Any
) -> Engine:
    """An engine of the kind around the policy in the folder; `single` builds the plain reference on every rank.

    `model` goes into the recipe's section, `ds_config` in place of DS_CONFIG.
    """
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(folder), "device": "cpu", **model},
            "projector": {"kind": "normalised"},
            "parallel": {
                "kind": kind,
                "threads": 1,
                "ranks_per_node": 1 if kind == "single" else lockstep.ranks.world_size,
            },
        }
    )
    own = Lockstep(Ranks()) if kind == "single" else lockstep
    world = lockstep.ranks.world_size
    return build_engine(recipe, own, {**(ds_config or DS_CONFIG), "train_batch_size": world})


def uneven_rows(policy: LatentPolicy, seed: int = 0) -> list[list[int]]:
    """Token ids of rows that differ wildly in length, markers and steps; two have no marker at all."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length, steps in [(40, [2, 1]), (60, [1]), (12, []), (90, [3, 1, 2]), (25, [2]), (8, []), (33, [3])]:
        ids = torch.randint(0, 250, (length,), generator=generator).tolist()
        for number, count in enumerate(steps):
            ids[5 + 9 * number : 5 + 9 * number] = policy.marker_ids(count)
        rows.append(ids)
    return rows


def report(lockstep: Lockstep, **values: Any) -> None:
    """One line for the test that started this program."""
    sys.stdout.write(json.dumps({"rank": lockstep.ranks.rank, **values}) + "\n")
    sys.stdout.flush()
