"""What comes every so many steps, where it falls: a lump that something else hides costs nothing, its mean might."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lump:
    """A refresh of the projector, or a checkpoint."""

    seconds: float
    every: int
    """Steps; 0: never."""

    @property
    def mean_s(self) -> float:
        """A step."""
        return self.seconds * _share(self.every)


def lumps_of_steps(one: Lump, other: Lump) -> Iterator[tuple[float, float]]:
    """(share of all steps, seconds of lumps in each of them), over a whole period: with both, one, the other, neither."""
    mine, its, both = _share(one.every), _share(other.every), _share(math.lcm(one.every, other.every))
    yield both, one.seconds + other.seconds
    yield mine - both, one.seconds
    yield its - both, other.seconds
    yield 1 - mine - its + both, 0.0


def _share(every: int) -> float:
    return 1 / every if every else 0.0
