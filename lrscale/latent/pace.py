"""How many forwards the others run: what a policy asks before each loop whose length depends on the data.

Where parameters are sharded, every forward and every backward gathers them from all ranks, so every rank has
to run the same ones. A loop takes the longest length of all ranks; a rank that has less of its own goes on
with holes: positions that no query sees and no loss counts.
"""

from __future__ import annotations

from typing import Protocol


class Pace(Protocol):
    """Agreement on lengths; see `lrscale.parallel.lockstep.Lockstep`."""

    def most(self, *counts: int) -> tuple[int, ...]:
        """Each count's maximum over all ranks. Every rank must call it, with as many counts."""
        ...


class Alone:
    """One process, or whole weights on every rank: nobody to wait for."""

    def most(self, *counts: int) -> tuple[int, ...]:
        return counts


ALONE = Alone()
