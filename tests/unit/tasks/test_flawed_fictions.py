"""Flawed Fictions from every place it may lie, its split, and its reward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from lrscale.config.task import FlawedFictionsConfig
from lrscale.tasks.flawed_fictions import FlawedFictions, split_rows
from lrscale.tasks.prompting import MARKER_PARAGRAPH

ROWS = [{"story": f"Once, {i} foxes met.", "cont_error": float(i % 2), "example_id": f"e{i}"} for i in range(20)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library converts files into its cache: not into the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def load(folder: Path, path: str, **settings: object) -> FlawedFictions:
    encode = settings.pop("encode", None)
    return FlawedFictions(
        FlawedFictionsConfig(kind="flawed_fictions", path=path, **settings), recipe_dir=folder, encode=encode
    )


def write_jsonl(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet", "folder", "saved", "saved_parts"])
def test_every_local_form_gives_the_same_prompts(tmp_path: Path, form: str) -> None:
    """What a machine without a network has; the order, and so the split, may not hang on the file format."""
    data = Dataset.from_list(ROWS)
    name = f"data.{form}"
    match form:
        case "jsonl" | "json":
            write_jsonl(tmp_path / name, ROWS)
        case "csv":
            data.to_csv(tmp_path / name)
        case "parquet":
            data.to_parquet(tmp_path / name)
        case "folder":
            (tmp_path / name).mkdir()
            data.to_parquet(tmp_path / name / "part.parquet")
        case "saved":
            data.save_to_disk(tmp_path / name)
        case "saved_parts":
            other = Dataset.from_list(ROWS[:3])
            DatasetDict({"flawed_fictions_long": other, "flawed_fictions": data}).save_to_disk(tmp_path / name)
    task = load(tmp_path, name, prompt_style="brief")
    prompts = [p for part in ("train", "eval", "test") for p in task.prompts(part, markers=False)]
    assert len(prompts) == 20
    for prompt in prompts:
        row = ROWS[int(prompt.prompt_id.removeprefix("row-"))]
        assert prompt.text.startswith(row["story"])
        assert prompt.columns["answer"] == ("Yes" if row["cont_error"] else "No")
        assert prompt.columns["example_id"] == row["example_id"] and "story" not in prompt.columns


@pytest.mark.parametrize("count", [7, 20, 414])
def test_split_is_the_published_one(count: int) -> None:
    """70/15/15, seed 42, as LiteReason's preparation cuts it: another order would test on its training stories."""
    order = np.random.default_rng(42).permutation(count).tolist()
    held_out = int(count * 0.15)
    train = count - 2 * held_out
    assert split_rows(count) == {
        "train": order[:train],
        "eval": order[train : train + held_out],
        "test": order[train + held_out :],
    }


def test_markers_are_told_of_only_where_asked(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    task = load(tmp_path, "d.jsonl")
    assert all(MARKER_PARAGRAPH in p.text for p in task.prompts("eval", markers=True))
    assert not any(MARKER_PARAGRAPH in p.text for p in task.prompts("eval", markers=False))


def test_unboxed_and_malformed_answers_score_0(tmp_path: Path) -> None:
    """The answer must be in the box: `Yes` in the text would be right half of the time."""
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    task = load(tmp_path, "d.jsonl")
    prompt = next(p for p in task.prompts("train", markers=False) if p.columns["answer"] == "Yes")
    scores = {r"\boxed{Yes}": 1, r"\boxed{No}": 0, "Yes": 0, r"\boxed{Yes": 0, r"\boxed{Maybe}": 0, "": 0}
    assert {text: task.score(prompt, text).value for text in scores} == scores
    assert task.answered(r"\boxed{No}") and not task.answered("Yes")


def test_broken_rows_are_told_with_their_place(tmp_path: Path) -> None:
    """Every kind of broken row at once, by file and line; none is skipped."""
    broken = [{"story": "a"}, {"story": " ", "cont_error": 1}, {"story": "a", "cont_error": "yes"}, {"cont_error": 0}]
    write_jsonl(tmp_path / "d.jsonl", [*ROWS, *broken])
    with (tmp_path / "d.jsonl").open("ab") as file:
        file.write(b'{"story": "\xff"}\n')
    with pytest.raises(ValueError, match=r"task\.path: 5 broken rows") as caught:
        load(tmp_path, "d.jsonl")
    for line, reason in (
        (21, "'cont_error' is missing"),
        (22, "'story' is empty"),
        (23, "'yes', needed 0 or 1"),
        (24, "'story' is missing"),
        (25, "not UTF-8"),
    ):
        assert any(f"d.jsonl:{line}:" in told and reason in told for told in str(caught.value).splitlines())


def test_broken_rows_of_tables_and_csv(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[4]["story"] = None
    rows[5]["cont_error"] = float("nan")
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"row 4: 'story' is null(?s:.)*row 5: 'cont_error' is nan"):
        load(tmp_path, "d.parquet")
    (tmp_path / "d.csv").write_bytes(b"story,cont_error\nfine,1\ncaf\xe9,0\n")
    with pytest.raises(ValueError, match=r"d\.csv:3: not UTF-8 at byte 4"):
        load(tmp_path, "d.csv")


def test_too_long_stories_are_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [*ROWS, {"story": "long " * 3000, "cont_error": 0}])
    with pytest.raises(ValueError, match=r"1 broken row\n.*d\.jsonl:21: the prompt has \d+ tokens"):
        load(tmp_path, "d.jsonl", encode=str.split, max_prompt_tokens=2000)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./absent", r"\./absent; nothing .*there is no such file"),
        ("absent.csv", "there is no such file"),
        ("stories.txt", r"'\.txt' is none of \.jsonl"),
        ("two", "has the parts a, b"),
        ("few.jsonl", "6 rows, which leaves none for eval"),
        ("empty_folder", "empty_folder"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "stories.txt").write_text("x")
    (tmp_path / "empty_folder").mkdir()
    part = Dataset.from_list(ROWS)
    DatasetDict({"a": part, "b": part}).save_to_disk(tmp_path / "two")
    write_jsonl(tmp_path / "few.jsonl", ROWS[:6])
    with pytest.raises(ValueError, match=rf"task\.path: (?s:.)*{message}"):
        load(tmp_path, path)


def test_offline_is_answered_with_what_to_do(tmp_path: Path) -> None:
    """The hub out of reach must not end in a stack of network exceptions."""
    code = (
        "import pathlib; from lrscale.config.task import FlawedFictionsConfig as C\n"
        "from lrscale.tasks.flawed_fictions import FlawedFictions as F\n"
        "try: F(C(kind='flawed_fictions'), recipe_dir=pathlib.Path('.').absolute())\n"
        "except ValueError as error: print(error)"
    )
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(["", *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert "given kahuja/flawed-fictions; nothing can be loaded from the hub" in done.stdout
    assert "Without a network" in done.stdout and "save_to_disk" in done.stdout
