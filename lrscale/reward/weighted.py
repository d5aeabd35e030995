"""Several reward functions as one reward: their weighted sum, each value kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrscale.records import Score, ScoreFailed
from lrscale.reward.functions import FunctionSpec, RewardFunction
from lrscale.reward.source import Needs, Passing, Result, Sample


@dataclass(frozen=True, slots=True)
class WeightedSpec:
    """(label, weight, function) each."""

    functions: tuple[tuple[str, float, FunctionSpec], ...]

    def open(self) -> WeightedFunctions:
        return WeightedFunctions(tuple((label, weight, spec.open()) for label, weight, spec in self.functions))


@dataclass(frozen=True, slots=True)
class WeightedFunctions:
    """All functions of a reward."""

    functions: tuple[tuple[str, float, RewardFunction], ...]

    def needs(self) -> Needs:
        return Needs(tuple(call for _, _, function in self.functions for call in function.needs().calls))

    def score(self, samples: Sequence[Sample]) -> list[Result]:
        """A sample that one of the functions fails on has failed."""
        by_label = {label: function.score(samples) for label, _, function in self.functions}
        return [self._sum({label: results[i] for label, results in by_label.items()}) for i in range(len(samples))]

    def _sum(self, results: dict[str, Result]) -> Result:
        failed = {label: result for label, result in results.items() if not isinstance(result, Score)}
        # A failure that stays decides: trying again would not help.
        for label, result in sorted(failed.items(), key=lambda item: isinstance(item[1], Passing)):
            if isinstance(result, Passing):
                failure = result.failure
                return Passing(ScoreFailed(failure.kind, f"{label}: {failure.detail}"), result.retry_after_s)
            assert isinstance(result, ScoreFailed)
            return ScoreFailed(result.kind, f"{label}: {result.detail}")
        values = {label: result.value for label, result in results.items() if isinstance(result, Score)}
        return Score(sum(weight * values[label] for label, weight, _ in self.functions), values)
