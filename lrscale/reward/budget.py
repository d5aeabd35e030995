"""How many scores may fail before a run stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lrscale.records import Score, ScoreFailed


class RewardBudgetError(RuntimeError):
    """More scores failed than the recipe allows; training on what is left would be training on a biased sample."""


@dataclass(frozen=True, slots=True)
class FailureBudget:
    """What the recipe allows."""

    max_failed_share: float = 0.0
    """Of a step's scores."""
    max_failed_steps: int = 0
    """So many steps in a row with failed scores end the run; 0: any number is fine."""

    def check(self, scores: Iterable[Score | ScoreFailed], *, failed_steps: int = 0) -> int:
        """The number of failed scores, if the budget holds.

        Args:
            scores: All of a step.
            failed_steps: How many steps right before this one had failed scores.

        Raises:
            RewardBudgetError: past the budget; with counts by kind and the first traceback.
        """
        everything = list(scores)
        failed = [score for score in everything if isinstance(score, ScoreFailed)]
        if not failed:
            return 0
        if len(failed) > self.max_failed_share * len(everything):
            why = (
                f"{len(failed)} of {len(everything)} scores failed ({len(failed) / len(everything):.0%}; "
                f"reward.max_failed_share allows {self.max_failed_share:.0%})"
            )
        elif self.max_failed_steps and failed_steps + 1 >= self.max_failed_steps:
            why = (
                f"{failed_steps + 1} steps in a row had failed scores, as many as reward.max_failed_steps allows; "
                f"in this one {len(failed)} of {len(everything)}"
            )
        else:
            return len(failed)
        kinds = Counter(score.kind for score in failed)
        shown = next((score for score in failed if score.kind == "error"), failed[0])
        raise RewardBudgetError(
            f"{why}: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}.\n"
            f"The first {shown.kind}: {shown.detail}\n"
            "Mend the reward (or the rows it fails on), or allow more with reward.max_failed_share"
            f"{' and reward.max_failed_steps' if self.max_failed_steps else ''}."
        )
