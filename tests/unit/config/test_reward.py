"""The reward section: kinds, defaults of their own, paths, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrscale.config.errors import RecipeError
from lrscale.config.load import load_recipe

ROWS = "task: {kind: jsonl, train: t.jsonl, eval: e.jsonl}\n"


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    for name in ("t.jsonl", "e.jsonl", "a.py", "b.py", "token"):
        (tmp_path / name).touch()


def recipe(folder: Path, text: str):
    (folder / "recipe.yaml").write_text(text)
    return load_recipe([folder / "recipe.yaml"]).recipe


def test_every_kind_loads_and_its_paths_start_at_the_recipe(tmp_path: Path) -> None:
    """Workers run elsewhere: a relative path would be somebody else's file."""
    text = "reward: {kind: functions, functions: [{label: a, path: a.py}, {label: b, path: b.py, weight: -0.5}]}"
    functions = recipe(tmp_path, ROWS + text).reward.functions
    assert [one.path for one in functions] == [str(tmp_path / "a.py"), str(tmp_path / "b.py")]
    http = recipe(tmp_path, ROWS + "reward: {kind: http, url: 'http://judge:8000/', token_file: token}").reward
    assert http.token_file == str(tmp_path / "token")
    model = recipe(tmp_path, ROWS + "reward: {kind: model, path: org/judge}").reward
    assert model.path == "org/judge"
    chapters = ROWS.replace("jsonl,", "next_chapter,", 1)
    assert recipe(tmp_path, chapters + "reward: {kind: vr_cli, path: org/generator}").reward.kind == "vr_cli"


def test_a_pool_written_in_part_keeps_its_kinds_own_defaults(tmp_path: Path) -> None:
    """`workers: 3` alone used to bring back the general defaults: a memory limit that no model fits into."""
    model = recipe(tmp_path, ROWS + "reward: {kind: model, path: org/judge, pool: {workers: 3}}").reward
    assert (model.pool.workers, model.pool.memory_mib, model.pool.batch_size) == (3, 0, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ROWS + "reward: {kind: functions, functions: [{label: a, path: c.py}]}", "no such file: .*c.py"),
        (ROWS + "reward: {kind: functions, functions: []}", "functions"),
        (ROWS + "reward: {kind: functions, functions: [{label: task, path: a.py}]}", "is taken by"),
        (
            ROWS + "reward: {kind: functions, functions: [{label: a, path: a.py}, {label: a, path: b.py}]}",
            "each label once",
        ),
        (ROWS + "reward: {kind: http, url: judge}", "url"),
        (ROWS + "reward: {kind: http, url: 'http://x/', token_file: none}", "no such file: .*none"),
        (ROWS + "reward: {kind: vr_cli}", "reward.path is missing"),
        (ROWS + "reward: {kind: function, path: a.py, pool: {worker: 3}}", "did you mean reward.pool.workers"),
        (ROWS.replace("jsonl,", "next_chapter,", 1), "scored by a frozen generator"),
        ("reward: {kind: vr_cli, path: org/generator}", "needs the columns story_so_far"),
        ("reward: {overlong: {limit: 10, ramp: 20}}", "ramp"),
    ],
)
def test_what_does_not_go_is_told(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(tmp_path, text)
