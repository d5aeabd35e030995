"""Which engine a recipe asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrscale.config.cluster import ParallelConfig
from lrscale.config.optimisation import OptimisationConfig
from lrscale.parallel.engine import Engine
from lrscale.parallel.ranks import Ranks, set_threads
from lrscale.parallel.single import SingleEngine

if TYPE_CHECKING:
    from lrscale.latent import LatentPolicy


def build_engine(policy: LatentPolicy, *, parallel: ParallelConfig, optimisation: OptimisationConfig) -> Engine:
    """The engine of `parallel.kind`. Raises ValueError for kinds that this release does not have."""
    if parallel.kind != "single":
        raise ValueError(
            f"parallel.kind is {parallel.kind}, which comes with a later release; "
            "this one trains in one process: set parallel.kind: single"
        )
    set_threads(parallel.threads)
    return SingleEngine(policy, optimisation, ranks=Ranks.from_environment())
