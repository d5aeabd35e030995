"""Scores of completions: the task's rule or a user's function, and the price of length."""

from lrscale.reward.rules import TaskScore
from lrscale.reward.scorer import RewardBudgetError, Scorer, build_scorer, check_failures

__all__ = ["RewardBudgetError", "Scorer", "TaskScore", "build_scorer", "check_failures"]
