"""How long sequences are: a distribution with a long tail, cut at the limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, slots=True)
class Lengths:
    """Positions of completions, tokens and latents together: log-normal, nothing above `longest`.

    Output lengths of language models are heavy-tailed, which is why the last few sequences decide how long a
    synchronous rollout takes (Kimi k1.5, arXiv 2501.12599, section 2.6; RollPacker, arXiv 2509.21009).
    """

    mean: float
    """Of what is generated, the cut included."""
    longest: int
    """Where the engine stops a sequence (rollout.max_new_tokens)."""
    spread: float
    """Standard deviation of the logarithm; 0: all are equally long."""

    @property
    def median(self) -> float:
        """Before the cut."""
        return min(self.mean, self.longest) if self.spread == 0.0 else _scale(self)

    def quantiles(self, count: int) -> list[int]:
        """`count` lengths that stand for as many draws, shortest first."""
        if count < 1:
            return []
        if self.spread == 0.0:
            return [max(1, round(self.median))] * count
        scale = self.median
        normal = NormalDist()
        return [
            max(1, min(self.longest, round(scale * math.exp(self.spread * normal.inv_cdf((index + 0.5) / count)))))
            for index in range(count)
        ]


def _scale(lengths: Lengths) -> float:
    """Median of the uncut distribution whose cut one has the wanted mean, by bisection."""
    wanted, longest, spread = lengths.mean, lengths.longest, lengths.spread
    if wanted >= longest:
        return longest * 1e3
    low, high = 1e-3, longest * 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _cut_mean(middle, spread, longest) < wanted else (low, middle)
    return low


def _cut_mean(scale: float, spread: float, longest: int) -> float:
    """E[min(X, longest)] of a log-normal X with median `scale`."""
    normal = NormalDist()
    z = math.log(longest / scale) / spread
    return scale * math.exp(spread**2 / 2) * normal.cdf(z - spread) + longest * (1 - normal.cdf(z))
