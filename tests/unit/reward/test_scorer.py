"""The scorer: keys, shaping, and the budget of failed scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lrscale.config.reward import (
    FormatConfig,
    FunctionRewardConfig,
    FunctionsRewardConfig,
    LengthPenaltyConfig,
    OverlongConfig,
    PoolConfig,
    TaskRewardConfig,
    WeightedFunctionConfig,
)
from lrscale.records import LatentSpan, Prompt, Rollout, Score, ScoreFailed
from lrscale.reward.budget import FailureBudget, RewardBudgetError
from lrscale.reward.build import Surroundings, build_scorer, fingerprint
from lrscale.reward.rules import holds_in_order, overlong_term
from lrscale.reward.scorer import Scorer

PRICE = LengthPenaltyConfig(price_per_100=0.5, latent_weight=0.2)
SMALL = PoolConfig(workers=1)


def rollout(tokens: int, *steps: int, prompt_steps: int = 0) -> Rollout:
    """A rollout of so many completion tokens, with a marker of the prompt's middle where prompt_steps is set."""
    spans = [LatentSpan(3 + i, n) for i, n in enumerate(steps)]
    if prompt_steps:
        spans.insert(0, LatentSpan(0, prompt_steps))
    total = sum(span.steps for span in spans)
    return Rollout((1, 2, 3), tuple(range(tokens)), torch.zeros(tokens), tuple(spans), torch.zeros(total, 2), 0, "stop")


def exact(prompt: Prompt, completion: str) -> Score:
    return Score(float(completion == prompt.columns["answer"]))


@contextmanager
def function_scorer(folder: Path, source: str, **config: Any) -> Iterator[Scorer]:
    (folder / "reward.py").write_text(source)
    reward = FunctionRewardConfig(kind="function", path="reward.py", **{"pool": SMALL, **config})
    with closing(build_scorer(reward, None, Surroundings(folder))) as scorer:
        yield scorer


def scores_of(scorer: Scorer) -> dict[Any, Score | ScoreFailed]:
    assert scorer.wait(60)
    return scorer.drain()


def test_task_scores_with_the_price_of_tokens_and_latent_steps(tmp_path: Path) -> None:
    """Locks out free latent steps, a price on the prompt's latents, and a price on wrong answers."""
    scorer = build_scorer(TaskRewardConfig(length_penalty=PRICE), exact, Surroundings(tmp_path))
    prompt = Prompt("a", "?", {"answer": "Yes"})
    scorer.submit((0, 1), prompt, rollout(40, 20, 30, prompt_steps=7), "Yes")
    scorer.submit((0, 0), prompt, rollout(40, 20, 30), "No")
    scores = scores_of(scorer)
    assert list(scores) == [(0, 1), (0, 0)]
    right = scores[0, 1]
    assert right.value == pytest.approx(1.0 - 0.5 * (40 + 0.2 * 50) / 100)
    assert right.parts["task"] == 1.0 and right.parts["task"] + right.parts["length"] == right.value
    assert scores[0, 0] == Score(0.0, {"task": 0.0, "length": 0.0})
    assert scorer.drain() == {}, "a drained sample is not scored again"


def test_price_may_exceed_the_reward_but_the_task_part_stays(tmp_path: Path) -> None:
    """Accuracy is read off parts['task']: a dear right answer is still right."""
    penalty = LengthPenaltyConfig(price_per_100=5.0)
    scorer = build_scorer(TaskRewardConfig(length_penalty=penalty), exact, Surroundings(tmp_path))
    scorer.submit("k", Prompt("a", "?", {"answer": "Yes"}), rollout(100), "Yes")
    assert scores_of(scorer)["k"] == Score(-4.0, {"task": 1.0, "length": -5.0})


def test_form_and_limit_count_for_wrong_answers_too_and_see_latent_steps(tmp_path: Path) -> None:
    """A limit that only counts tokens is a free pass for latent steps."""
    reward = TaskRewardConfig(
        overlong=OverlongConfig(limit=100, ramp=50, penalty=2.0),
        format=FormatConfig(require=("<a>", "</a>"), bonus=0.5),
    )
    scorer = build_scorer(reward, exact, Surroundings(tmp_path))
    scorer.submit("k", Prompt("a", "?", {"answer": "Yes"}), rollout(55, 20), "<a>No</a>")
    score = scores_of(scorer)["k"]
    assert score.parts == {"task": 0.0, "length": 0.0, "overlong": -1.0, "format": 0.5} and score.value == -0.5
    config = OverlongConfig(limit=100, ramp=50)
    assert [overlong_term(n, config) for n in (0, 50, 75, 100, 900)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert holds_in_order("x<a>y</a>", ("<a>", "</a>")) and not holds_in_order("</a><a>", ("<a>", "</a>"))
    assert not holds_in_order("<<", ("<<", "<")), "texts may not overlap"


def test_function_scores_keep_their_keys_and_failures(tmp_path: Path) -> None:
    """A failure in the middle must not shift the scores behind it to other samples."""
    source = (
        "def reward(completions, **columns):\n    return [None if c == 'skip' else float(c) for c in completions]\n"
    )
    with function_scorer(tmp_path, source, max_failed_share=0.5, length_penalty=PRICE) as scorer:
        assert scorer.budget == FailureBudget(0.5)
        for key, text in {"a": "2", "b": "skip", "c": "broken", "d": "-1"}.items():
            scorer.submit(key, Prompt(key, "?"), rollout(10), text)
        scores = scores_of(scorer)
        assert list(scores) == ["a", "b", "c", "d"]
        assert scores["a"].value == pytest.approx(2.0 - 0.05)
        assert scores["a"].parts["task"] == 2.0
        assert (scores["b"].kind, scores["c"].kind) == ("invalid", "error")
        assert scores["d"].value == -1.0
        assert scorer.drain() == {}
        stats = scorer.take_stats()
        assert (stats.samples, stats.failed) == (4, {"invalid": 1, "error": 1})


def test_several_functions_are_summed_and_kept_apart(tmp_path: Path) -> None:
    """A sample that one function fails on has failed: half a reward would be a lie."""
    (tmp_path / "a.py").write_text("def reward(completions): return [float(c) for c in completions]\n")
    (tmp_path / "b.py").write_text("def judge(completions, latent_steps): return latent_steps\n")
    functions = (
        WeightedFunctionConfig(label="number", path="a.py", weight=2.0),
        WeightedFunctionConfig(label="steps", path="b.py", name="judge", weight=-0.5),
    )
    config = FunctionsRewardConfig(kind="functions", functions=functions, pool=SMALL)
    with closing(build_scorer(config, None, Surroundings(tmp_path))) as scorer:
        scorer.submit(0, Prompt("p", "?"), rollout(5, 2, 2), "3")
        scorer.submit(1, Prompt("p", "?"), rollout(5), "three")
        scores = scores_of(scorer)
    assert scores[0] == Score(4.0, {"number": 3.0, "steps": 4.0, "task": 4.0, "length": 0.0})
    assert scores[1].kind == "error" and scores[1].detail.startswith("number: ")


def test_same_key_twice_is_refused(tmp_path: Path) -> None:
    """Locks out a sample that silently replaces another."""
    scorer = build_scorer(TaskRewardConfig(), exact, Surroundings(tmp_path))
    with function_scorer(tmp_path, "def reward(completions): return [1.0]") as pooled:
        for one in (scorer, pooled):
            one.submit("k", Prompt("a", "?", {"answer": ""}), rollout(1), "")
            with pytest.raises(ValueError, match="submitted twice"):
                one.submit("k", Prompt("a", "?", {"answer": ""}), rollout(1), "")


def test_missing_column_stops_at_the_first_sample(tmp_path: Path) -> None:
    """A misspelt column is the user's mistake, to be told at once and not as 768 failed scores."""
    source = "def reward(completions, solution): return [1.0] * len(completions)\n"
    with function_scorer(tmp_path, source) as scorer, pytest.raises(ValueError, match="needs solution"):
        scorer.submit("k", Prompt("a", "?", {"answer": "1"}), rollout(1), "")


def test_recipes_that_ask_for_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward\.kind: function"):
        build_scorer(TaskRewardConfig(), None, Surroundings(tmp_path))
    with pytest.raises(ValueError, match=r"absent\.py"):
        build_scorer(FunctionRewardConfig(kind="function", path="absent.py", pool=SMALL), None, Surroundings(tmp_path))
    dies = "import os\nos._exit(9)\n"
    with pytest.raises(ValueError, match="exit code 9, while it loaded"), function_scorer(tmp_path, dies):
        pass
    sleeps = "import time\ntime.sleep(1000)\n"
    slow = PoolConfig(workers=1, start_timeout_s=0.5)
    with pytest.raises(ValueError, match="start_timeout_s"), function_scorer(tmp_path, sleeps, pool=slow):
        pass


def test_an_edited_file_is_another_reward(tmp_path: Path) -> None:
    """Scores of the old function must not be taken for those of the mended one."""
    config = FunctionRewardConfig(kind="function", path="r.py")
    prints = []
    for source in ("a", "b", "a"):
        (tmp_path / "r.py").write_text(source)
        prints.append(fingerprint(config, tmp_path))
    assert prints[0] == prints[2] != prints[1]


def test_budget_of_failures_names_counts_and_the_first_traceback() -> None:
    """The run stops past the share, not at it; the message leads with a real error over an invalid value."""
    invalid, error = ScoreFailed("invalid", "nan"), ScoreFailed("error", "reward.py:3 ZeroDivisionError")
    good = [Score(0.0)] * 8
    budget = FailureBudget(0.2)
    assert budget.check([*good, invalid, error]) == 2
    assert FailureBudget(0.0).check([]) == 0
    with pytest.raises(RewardBudgetError, match=r"3 of 11 .*27%.*20%(?s:.)*2 invalid, 1 error(?s:.)*ZeroDivisionError"):
        budget.check([invalid, *good, invalid, error])


def test_steps_in_a_row_with_failures_end_a_run_too() -> None:
    """A few failures a step, for ever, are a reward that is blind to some of the data."""
    budget = FailureBudget(0.5, max_failed_steps=3)
    scores = [Score(0.0), Score(1.0), ScoreFailed("timeout", "no answer")]
    assert budget.check(scores, failed_steps=1) == 1
    assert budget.check([Score(1.0)], failed_steps=2) == 0
    with pytest.raises(RewardBudgetError, match=r"3 steps in a row(?s:.)*1 timeout"):
        budget.check(scores, failed_steps=2)
