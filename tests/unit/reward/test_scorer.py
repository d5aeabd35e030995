"""The scorer: keys, prices, and the budget of failed scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrscale.config.rollout import FunctionRewardConfig, LengthPenaltyConfig, TaskRewardConfig
from lrscale.records import LatentSpan, Prompt, Rollout, Score, ScoreFailed
from lrscale.reward import RewardBudgetError, build_scorer, check_failures

PRICE = LengthPenaltyConfig(price_per_100=0.5, latent_weight=0.2)


def rollout(tokens: int, *steps: int, prompt_steps: int = 0) -> Rollout:
    """A rollout of so many completion tokens, with a marker of the prompt's middle where prompt_steps is set."""
    spans = [LatentSpan(3 + i, n) for i, n in enumerate(steps)]
    if prompt_steps:
        spans.insert(0, LatentSpan(0, prompt_steps))
    total = sum(span.steps for span in spans)
    return Rollout((1, 2, 3), tuple(range(tokens)), torch.zeros(tokens), tuple(spans), torch.zeros(total, 2), 0, "stop")


def exact(prompt: Prompt, completion: str) -> Score:
    return Score(float(completion == prompt.columns["answer"]))


def test_task_scores_with_the_price_of_tokens_and_latent_steps(tmp_path: Path) -> None:
    """Locks out free latent steps, a price on the prompt's latents, and a price on wrong answers."""
    scorer = build_scorer(TaskRewardConfig(length_penalty=PRICE), exact, recipe_dir=tmp_path)
    prompt = Prompt("a", "?", {"answer": "Yes"})
    scorer.submit((0, 1), prompt, rollout(40, 20, 30, prompt_steps=7), "Yes")
    scorer.submit((0, 0), prompt, rollout(40, 20, 30), "No")
    scores = scorer.drain()
    assert list(scores) == [(0, 1), (0, 0)]
    right = scores[0, 1]
    assert right.value == pytest.approx(1.0 - 0.5 * (40 + 0.2 * 50) / 100)
    assert right.parts["task"] == 1.0 and right.parts["task"] + right.parts["length"] == right.value
    assert scores[0, 0] == Score(0.0, {"task": 0.0, "length": 0.0})
    assert scorer.drain() == {}, "a drained sample is not scored again"


def test_price_may_exceed_the_reward_but_the_task_part_stays(tmp_path: Path) -> None:
    """Accuracy is read off parts['task']: a dear right answer is still right."""
    penalty = LengthPenaltyConfig(price_per_100=5.0)
    scorer = build_scorer(TaskRewardConfig(length_penalty=penalty), exact, recipe_dir=tmp_path)
    scorer.submit("k", Prompt("a", "?", {"answer": "Yes"}), rollout(100), "Yes")
    assert scorer.drain()["k"] == Score(-4.0, {"task": 1.0, "length": -5.0})


def test_function_scores_keep_their_keys_and_failures(tmp_path: Path) -> None:
    """A failure in the middle must not shift the scores behind it to other samples."""
    (tmp_path / "reward.py").write_text(
        "def reward(completions, **columns):\n    return [None if c == 'skip' else float(c) for c in completions]\n"
    )
    config = FunctionRewardConfig(kind="function", path="reward.py", max_failed_share=0.5, length_penalty=PRICE)
    scorer = build_scorer(config, None, recipe_dir=tmp_path)
    assert scorer.max_failed_share == 0.5
    for key, text in {"a": "2", "b": "skip", "c": "broken", "d": "-1"}.items():
        scorer.submit(key, Prompt(key, "?"), rollout(10), text)
    scores = scorer.drain()
    assert scores["a"].value == pytest.approx(2.0 - 0.05)
    assert scores["a"].parts["task"] == 2.0
    assert (scores["b"].kind, scores["c"].kind) == ("invalid", "error")
    assert scores["d"].value == -1.0
    assert scorer.drain() == {}


def test_same_key_twice_is_refused(tmp_path: Path) -> None:
    """Locks out a sample that silently replaces another."""
    scorer = build_scorer(TaskRewardConfig(), exact, recipe_dir=tmp_path)
    scorer.submit("k", Prompt("a", "?", {"answer": ""}), rollout(1), "")
    with pytest.raises(ValueError, match="submitted twice"):
        scorer.submit("k", Prompt("a", "?", {"answer": ""}), rollout(1), "")


def test_missing_column_stops_at_the_first_sample(tmp_path: Path) -> None:
    """A misspelt column is the user's mistake, to be told at once and not as 768 failed scores."""
    (tmp_path / "reward.py").write_text("def reward(completions, solution): return [1.0] * len(completions)\n")
    scorer = build_scorer(FunctionRewardConfig(kind="function", path="reward.py"), None, recipe_dir=tmp_path)
    with pytest.raises(ValueError, match="needs solution"):
        scorer.submit("k", Prompt("a", "?", {"answer": "1"}), rollout(1), "")


def test_recipes_that_ask_for_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward\.kind: function"):
        build_scorer(TaskRewardConfig(), None, recipe_dir=tmp_path)
    with pytest.raises(ValueError, match=r"reward\.timeout_s: given 5"):
        build_scorer(FunctionRewardConfig(kind="function", path="r.py", timeout_s=5), None, recipe_dir=tmp_path)
    with pytest.raises(ValueError, match=r"absent\.py"):
        build_scorer(FunctionRewardConfig(kind="function", path="absent.py"), None, recipe_dir=tmp_path)


def test_budget_of_failures_names_counts_and_the_first_traceback() -> None:
    """The run stops past the share, not at it; the message leads with a real error over an invalid value."""
    invalid, error = ScoreFailed("invalid", "nan"), ScoreFailed("error", "reward.py:3 ZeroDivisionError")
    good = [Score(0.0)] * 8
    assert check_failures([*good, invalid, error], 0.2) == 2
    assert check_failures([], 0.0) == 0
    with pytest.raises(RewardBudgetError, match=r"3 of 11 .*27%.*20%(?s:.)*2 invalid, 1 error(?s:.)*ZeroDivisionError"):
        check_failures([invalid, *good, invalid, error], 0.2)
