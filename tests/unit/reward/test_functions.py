"""User reward functions: loading, recognition, calling, and what counts as a score."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from lrscale.records import Prompt, Score, ScoreFailed
from lrscale.reward.functions import RewardFunction, as_scores, load_reward_function
from lrscale.reward.source import Passing, Sample


def sample(text: str, completion: str, **columns: object) -> Sample:
    return Sample(Prompt(f"id-{text}", text, columns), completion, tuple(range(len(completion))))


@pytest.fixture
def load(tmp_path: Path):
    """Writes a reward file and loads it."""

    def write_and_load(source: str, name: str = "") -> RewardFunction:
        path = tmp_path / "my rewards.py"
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return load_reward_function(path, name)

    return write_and_load


PAIR = [sample("2+2=", "4", answer="4", level=1), sample("2+3=", "6", answer="5", level=2)]


def values(results: list[Score | ScoreFailed]) -> list[float | str]:
    return [r.value if isinstance(r, Score) else r.kind for r in results]


def test_trl_form_gets_columns_as_lists(load) -> None:
    """Locks out columns handed over as one row's value, or rows out of order."""
    function = load("""
        def reward(prompts, completions, answer, **columns):
            assert prompts == ["2+2=", "2+3="] and columns["level"] == [1, 2]
            assert columns["completion_ids"] == [[0], [0]]
            return [float(c == a) for c, a in zip(completions, answer)]
    """)
    assert function.form == "trl"
    assert function.score(PAIR) == [Score(1.0), Score(0.0)]


def test_trl_function_without_prompts_or_columns(load) -> None:
    """TRL's own examples take `completions` alone: no unexpected keyword may reach them."""
    function = load("def reward_fn(completions): return [len(c) for c in completions]")
    assert values(function.score(PAIR)) == [1.0, 1.0]


def test_openrlhf_form_and_its_dict_of_tensors(load) -> None:
    """Locks out queries without the prompt, labels from anywhere but `answer`, and tensors refused."""
    function = load("""
        import torch
        def reward_func(queries, prompts, labels, **kwargs):
            right = [q == p + a for q, p, a in zip(queries, prompts, labels)]
            rewards = torch.tensor(right, dtype=torch.bfloat16, requires_grad=True)
            return {"rewards": rewards, "scores": rewards, "extra_logs": {}}
    """)
    assert function.form == "openrlhf"
    assert values(function.score(PAIR)) == [1.0, 0.0]


def test_openrlhf_labels_without_an_answer_column(load) -> None:
    """OpenRLHF's template always names labels; data without answers must not be refused for it."""
    function = load("def reward_func(queries, prompts, labels): return [float(l is None) for l in labels]")
    function.needs().check({})
    assert values(function.score([sample("a", "b")])) == [1.0]


def test_one_bad_sample_takes_no_other_along(load) -> None:
    """A raise on one sample of the batch used to be every sample's failure."""
    function = load("""
        def check(completion):
            return 10 / int(completion)

        def reward(prompts, completions, **columns):
            return [check(c) for c in completions]
    """)
    results = function.score([sample("a", "5"), sample("b", "0"), sample("c", "x"), sample("d", "2")])
    assert values(results) == [2.0, "error", "error", 5.0]
    detail = results[1].detail
    assert "ZeroDivisionError" in detail and "my rewards.py" in detail and "line 3, in check" in detail
    assert "'id-b'" in detail
    assert "functions.py" not in detail, "our own frames are noise to the user"


def test_raise_on_a_single_sample_is_not_called_twice(load) -> None:
    function = load("""
        calls = []
        def reward(completions):
            calls.append(len(completions))
            raise SystemExit(3)
    """)
    assert values(function.score([sample("a", "b")])) == ["error"]
    assert function.call.__globals__["calls"] == [1]


def test_errors_that_may_pass_are_marked(load) -> None:
    """A judge that is restarting is no reason to drop a sample, a bug in the function is no reason to try again."""
    function = load("""
        from lrscale.reward import PassingError
        def reward(completions):
            raise {"own": PassingError, "refused": ConnectionError, "late": TimeoutError, "bug": KeyError}[completions[0]]
    """)
    results = [function.score([sample("a", text)])[0] for text in ("own", "refused", "late", "bug")]
    assert [isinstance(result, Passing) for result in results] == [True, True, True, False]
    assert results[0].failure.kind == "unavailable" and results[3].kind == "error"


def test_conversational_trl_function_is_told_why_it_fails(load) -> None:
    function = load("def reward(completions, **kw): return [len(c[0]['content']) for c in completions]")
    (result,) = function.score([sample("a", "b")])
    assert result.kind == "error" and "conversational form" in result.detail


def test_interrupt_is_not_a_failed_score(load) -> None:
    """Ctrl-C inside a reward function must not be taken for an answer."""
    function = load("def reward(completions): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        function.score(PAIR)


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), -float("inf"), None, "1.0", 1j, [1.0], 10**400, torch.tensor([1.0]), {}]
)
def test_what_is_no_number_is_invalid_and_never_zero(bad: object) -> None:
    """Locks out `float(x or 0)`: a missing score trained on as a 0 teaches that the answer was wrong."""
    first, second = as_scores([bad, 1.0], 2, form="trl")
    assert isinstance(first, ScoreFailed) and first.kind == "invalid"
    assert second == Score(1.0)


@pytest.mark.parametrize(
    "good", [1, True, 1.0, np.float32(1), np.int64(1), np.bool_(1), torch.tensor(1.0), torch.ones((), dtype=torch.bool)]
)
def test_numbers_of_every_library(good: object) -> None:
    assert as_scores([good], 1, form="trl") == [Score(1.0)]


@pytest.mark.parametrize(
    "raw", [torch.tensor([1.0, 0.0]), np.array([1.0, 0.0]), (1, 0), [1.0, 0.0], torch.tensor([True, False])]
)
def test_sequences_of_every_library(raw: object) -> None:
    assert as_scores(raw, 2, form="trl") == [Score(1.0), Score(0.0)]


@pytest.mark.parametrize(
    "raw",
    [[1.0], [1.0, 1.0, 1.0], [], None, "ab", 1.0, torch.ones(2, 1), torch.ones(()), {"rewards": [1, 1]}, iter([1, 1])],
)
def test_wrong_length_or_type_fails_the_whole_batch(raw: object) -> None:
    """Scores that cannot be matched to samples may not be handed to whichever come first."""
    results = as_scores(raw, 2, form="trl")
    assert [r.kind for r in results] == ["invalid", "invalid"]


def test_openrlhf_dict_without_rewards() -> None:
    (result,) = as_scores({"scores": [1.0]}, 1, form="openrlhf")
    assert result.kind == "invalid" and "scores" in result.detail


def test_awaitable_from_a_plain_function_is_invalid(load, recwarn: pytest.WarningsRecorder) -> None:
    function = load("""
        async def judge(): return [1.0]
        def reward(completions): return judge()
    """)
    assert values(function.score([sample("a", "b")])) == ["invalid"]
    assert not recwarn.list, "the coroutine is closed, or Python warns much later"


@pytest.mark.parametrize(
    "source",
    [
        "def reward(samples, answers): ...",
        "def reward(*args, **kwargs): ...",
        "def reward(prompts, completions, queries): ...",
        "def reward(prompts, completions, /): ...",
        "reward = max",
    ],
)
def test_unknown_signature_shows_both_forms_and_what_was_found(load, source: str) -> None:
    with pytest.raises(ValueError, match=r"my rewards\.py.*reward(?s:.)*TRL(?s:.)*OpenRLHF"):
        load(source)


def test_unknown_signature_names_the_line(load) -> None:
    with pytest.raises(ValueError, match=r"my rewards\.py:3: reward\(samples\)"):
        load("x = 1\n\ndef reward(samples): ...")


@pytest.mark.parametrize(
    "source",
    [
        "async def reward(completions): ...",
        "class R:\n    async def __call__(self, completions): ...\nreward = R()",
    ],
)
def test_async_is_refused_at_load(load, source: str) -> None:
    with pytest.raises(ValueError, match="async"):
        load(source)


def test_callable_object_and_decorated_function(load) -> None:
    function = load("""
        import functools
        def logged(f):
            @functools.wraps(f)
            def inner(*args, **kwargs): return f(*args, **kwargs)
            return inner
        class Right:
            def __call__(self, completions, answer): return [c == a for c, a in zip(completions, answer)]
        reward = logged(Right().__call__)
    """)
    assert values(function.score(PAIR)) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("def score(completions): ...", "", "exactly one of reward, reward_func, reward_fn; it defines score"),
        ("def reward(completions): ...\ndef reward_fn(completions): ...", "", "exactly one of"),
        ("def reward(completions): ...", "judge", "'judge'; it defines reward"),
        ("judge = 3", "judge", "'judge'"),
        ("def reward(:", "", r"does not run:(?s:.)*line 1(?s:.)*SyntaxError"),
        ("x = 1\n1 / 0", "", r"line 2(?s:.)*ZeroDivisionError"),
        ("import helper_beside_it", "", r"ModuleNotFoundError(?s:.)*PYTHONPATH"),
        ("raise SystemExit('no')", "", "does not run"),
    ],
)
def test_bad_files_are_answered_with_file_and_line(load, source: str, name: str, message: str) -> None:
    before = set(sys.modules)
    with pytest.raises(ValueError, match=message) as caught:
        load(source, name)
    assert "my rewards.py" in str(caught.value)
    assert not {n for n in set(sys.modules) - before if "user_reward" in n and "does not run" in str(caught.value)}


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(ValueError, match=r"cannot read .*recipe's folder"):
            load_reward_function(path)


def test_file_runs_once_and_leaves_nothing_behind(load, tmp_path: Path) -> None:
    """A reward model loaded at module level must not be loaded twice; sys.path and the folder stay clean."""
    source = """
        import dataclasses, pathlib
        pathlib.Path(__file__).with_suffix(".log").open("a").write("run ")
        @dataclasses.dataclass
        class Row: n: "int" = 1
        def reward(completions): return [Row().n for _ in completions]
    """
    paths = list(sys.path)
    assert load(source).call is load(source).call
    assert values(load(source).score(PAIR)) == [1.0, 1.0]
    assert sys.path == paths
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my rewards.log", "my rewards.py"]
    assert (tmp_path / "my rewards.log").read_text() == "run "


def test_edited_file_is_run_anew(load) -> None:
    """Same length, same second: a bytecode cache keyed by time would give the old function."""
    assert values(load("def reward(completions): return [1] * len(completions)").score(PAIR)) == [1.0, 1.0]
    assert values(load("def reward(completions): return [2] * len(completions)").score(PAIR)) == [2.0, 2.0]


def test_columns_are_checked_before_the_call(load) -> None:
    function = load("def reward(completions, solution, level=0): return [1.0] * len(completions)")
    with pytest.raises(ValueError, match=r"needs solution; the data has the columns answer"):
        function.needs().check({"answer": "4"})
    with pytest.raises(ValueError, match=r"column 'completions'"):
        function.needs().check({"solution": 1, "completions": 2})
    function.needs().check({"solution": "4"})
