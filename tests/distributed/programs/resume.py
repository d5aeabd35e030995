"""Saves a trained engine, or loads what another number of ranks saved, and takes the next steps.

resume save KIND FOLDER CHECKPOINT EXPORT
resume load KIND FOLDER CHECKPOINT
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch

from lrscale.latent import LatentPolicy
from lrscale.parallel.engine import Engine
from lrscale.parallel.export import export_model
from tests.distributed.programs.equality import lite, projector_step, rl_rows, rl_step
from tests.distributed.programs.job import build, report, start, uneven_rows

ROLLOUT_POLICY = Path(__file__).parents[3] / "lrscale/tasks/assets/tiny_base"


def main() -> None:
    what, kind, folder, checkpoint = sys.argv[1:5]
    lockstep = start()
    # Rollouts come from one fixed policy, so that every number of ranks trains on the same ones.
    plain = LatentPolicy.from_pretrained(ROLLOUT_POLICY)
    engine = build(kind, Path(folder), lockstep)
    if what == "save":
        take_steps(engine, plain, first=0)
        take_steps(engine, plain, first=1)
        lockstep.on_main(lambda: Path(checkpoint).mkdir())
        engine.save(Path(checkpoint))
        export_model(engine, Path(sys.argv[5]), max_shard_bytes=10**6)
    else:
        before = digests(engine)
        engine.load(Path(checkpoint))
        assert before != digests(engine), "the test must begin with other weights"
    weights = digests(engine)
    report(lockstep, weights=weights, losses=take_steps(engine, plain, first=2))


def take_steps(engine: Engine, plain: LatentPolicy, first: int) -> list[float]:
    rows = [lite(engine.policy, ids) for ids in uneven_rows(engine.policy, seed=first)]
    return [projector_step(engine, [row for row in rows if row.spans]), rl_step(engine, rl_rows(plain, first), first)]


def digests(engine: Engine) -> dict[str, str]:
    """Every whole tensor's bytes, shortened."""
    return {name: digest(tensor) for name, tensor in engine.full_parameters()}


def digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    main()
