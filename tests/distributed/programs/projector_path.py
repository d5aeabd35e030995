"""A sharded policy whose projector comes from a folder of its own.

projector_path KIND FOLDER
"""

from __future__ import annotations

import sys

from lrscale.config.recipe import Recipe
from lrscale.latent.hf_layout import PROJECTOR_PREFIX
from lrscale.parallel.build import build_engine
from tests.distributed.programs.job import DS_CONFIG, report, start
from tests.distributed.programs.resume import digests


def main() -> None:
    kind, folder = sys.argv[1:3]
    lockstep = start()
    world = lockstep.ranks.world_size
    recipe = Recipe.model_validate(
        {
            "model": {"device": "cpu"},
            "projector": {"kind": "normalised", "path": folder},
            "parallel": {"kind": kind, "ranks_per_node": world},
        }
    )
    engine = build_engine(recipe, lockstep, {**DS_CONFIG, "train_batch_size": world})
    found = {name: digest for name, digest in digests(engine).items() if name.startswith(PROJECTOR_PREFIX)}
    report(lockstep, projector=found)


if __name__ == "__main__":
    main()
