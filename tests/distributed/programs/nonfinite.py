"""One rank's row holds a latent that is not a number: all ranks must stop before the update.

nonfinite KIND FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from lrscale.parallel.engine import NonFiniteError
from tests.distributed.programs.equality import rl_rows, rl_step
from tests.distributed.programs.job import build, report, start
from tests.distributed.programs.resume import digests


def main() -> None:
    kind, folder = sys.argv[1:3]
    lockstep = start()
    plain = build("single", Path(folder), lockstep).policy
    engine = build(kind, Path(folder), lockstep)
    rows = rl_rows(plain, 0)
    victim = next(index for index, row in enumerate(rows) if len(row.rollout.latents_LH) and row.advantage)
    poisoned = torch.full_like(rows[victim].rollout.latents_LH, float("nan"))
    rows[victim] = replace(rows[victim], rollout=replace(rows[victim].rollout, latents_LH=poisoned))
    before, words = digests(engine), ""
    try:
        rl_step(engine, rows, step=7)
    except NonFiniteError as error:
        words = str(error)
    report(lockstep, words=words, name=rows[victim].name, unchanged=before == digests(engine))


if __name__ == "__main__":
    main()
