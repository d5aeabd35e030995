"""The user's own prompts: every broken row is told with its place, none is dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lrscale.config.task import JsonlConfig
from lrscale.records import Prompt
from lrscale.tasks.jsonl import Jsonl
from lrscale.tasks.prompting import MARKER_PARAGRAPH

GOOD = [{"prompt": "What is 2 + 2?", "answer": "4", "level": 1}, {"prompt": "3 + 3?\n", "answer": 6}]


def lines(*rows: object) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def build(tmp_path: Path):
    """Writes both files and builds the task."""

    def write_and_build(train: bytes, eval_: bytes | None = None, encode=None, **settings: object) -> Jsonl:
        (tmp_path / "train.jsonl").write_bytes(train)
        (tmp_path / "eval.jsonl").write_bytes(lines(*GOOD) if eval_ is None else eval_)
        config = JsonlConfig(kind="jsonl", train="train.jsonl", eval="eval.jsonl", **settings)
        return Jsonl(config, recipe_dir=tmp_path, encode=encode)

    return write_and_build


def test_rows_become_prompts_in_order_with_all_columns(build) -> None:
    """Locks out ids that change with the split's neighbours, and rows that lack a column others have."""
    task = build(lines(*GOOD) + b"\n  \n")
    assert task.prompts("train", markers=False) == [
        Prompt("train-000001", "What is 2 + 2?", {"answer": "4", "level": 1}),
        Prompt("train-000002", "3 + 3?\n", {"answer": 6, "level": None}),
    ]
    assert [p.prompt_id for p in task.prompts("eval", markers=False)] == ["eval-000001", "eval-000002"]


def test_marker_paragraph_only_for_arms_with_markers(build) -> None:
    """The discrete arm must not be told of markers, and a recipe may switch the paragraph off."""
    task = build(lines(*GOOD))
    plain, told = (task.prompts("train", markers=m)[0] for m in (False, True))
    assert told.text == f"{plain.text}\n\n{MARKER_PARAGRAPH}"
    assert (told.prompt_id, told.columns) == (plain.prompt_id, plain.columns)
    off = build(lines(*GOOD), marker_paragraph=False)
    assert off.prompts("train", markers=True) == off.prompts("train", markers=False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "?", "answer": 1}, r"the key 'prompt' is missing \(keys: question, answer\)"),
        ({"prompt": " \n", "answer": "4"}, "'prompt' is empty"),
        ({"prompt": ["a"], "answer": "4"}, "'prompt' is a list, needed a text"),
        ({"prompt": None, "answer": "4"}, "'prompt' is null"),
        ({"prompt": "a"}, "the key 'answer' is missing, which other rows have"),
        ({"prompt": "a", "answer": ""}, "'answer' is empty"),
        ({"prompt": "a", "answer": None}, "'answer' is empty"),
        ({"prompt": "a \ud800", "answer": "4"}, "half a surrogate pair at character 2"),
        (["prompt", "answer"], "the line is a list, needed an object"),
        (b"\n", "the line is empty"),
        (b'{"prompt": "a", \n', "not JSON: .* at character"),
        (b'{"prompt": "caf\xe9", "answer": "4"}\n', r"not UTF-8 at byte 16 of the line \(0xe9\)"),
        (b'{"prompt": "a", "answer": NaN}\n', "NaN is no JSON"),
        (b'{"prompt": "a", "answer": "1", "answer": "2"}\n', "'answer' is there more than once"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
    ],
)
def test_each_broken_row_is_told_with_file_and_line(build, row: object, reason: str) -> None:
    """A row that is skipped in silence changes what was trained on."""
    with pytest.raises(ValueError, match=rf"1 broken row\n  .*train\.jsonl:2: .*{reason}"):
        build(lines(GOOD[0], row, GOOD[1]))


def test_all_problems_of_both_files_are_told_at_once(build) -> None:
    """Locks out one error a start: the first 20 are listed, the rest counted."""
    with pytest.raises(ValueError, match="31 broken rows") as caught:
        build(lines(*[{"prompt": ""}] * 30, *GOOD), lines(GOOD[0], b"{\n"))
    message = str(caught.value)
    # What cannot be parsed is known before the rows are looked at.
    assert message.count(".jsonl:") == 20 and "eval.jsonl:2: not JSON" in message and "... and 11 more" in message
    assert "task.train, task.eval" in message


def test_answers_may_be_left_out_altogether(build) -> None:
    """A reward function may need no gold answer; but a row without one among others that have it is broken."""
    rows = lines({"prompt": "Write a poem."}, {"prompt": "Another."})
    task = build(rows, rows)
    assert task.prompts("train", markers=False)[0].columns == {}
    with pytest.raises(ValueError, match=r"train\.jsonl:1: the key 'answer' is missing"):
        build(rows)


def test_length_is_counted_in_tokens_with_the_marker_paragraph(build) -> None:
    """A prompt that only fits without the paragraph would be cut or refused in the middle of the latent arm."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [MARKER_PARAGRAPH], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    paragraph = len(encode(f"\n\n{MARKER_PARAGRAPH}"))
    rows = lines({"prompt": "aaaa bbbb", "answer": "x"}, {"prompt": "a", "answer": "x"})
    limit = paragraph + 4
    with pytest.raises(ValueError, match=rf"train\.jsonl:1: the prompt has \d+ tokens, .*allows {limit}") as caught:
        build(rows, rows, encode, max_prompt_tokens=limit)
    assert f"{paragraph} of them the marker paragraph (task.marker_paragraph: false" in str(caught.value)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens; task.max_prompt_tokens allows 1"):
        build(rows, rows, encode, max_prompt_tokens=1, marker_paragraph=False)
    assert "train.jsonl:2" not in str(caught.value) and "eval.jsonl:1" in str(caught.value)
    build(rows, rows, encode, max_prompt_tokens=limit, marker_paragraph=False)
    build(rows, rows, None, max_prompt_tokens=1)


def test_limit_reads_no_further(build) -> None:
    """Trying a recipe on the first rows of a large file must not parse the rest."""
    task = build(lines(*GOOD, b"not read\n"), limit=2)
    assert len(task.prompts("train", markers=False)) == 2
    assert len(build(lines(*GOOD, b"not read\n"), limit=1).prompts("train", markers=False)) == 1


def test_windows_files_and_other_line_separators(build) -> None:
    """A byte order mark, CRLF, and U+2028 inside a string are no broken rows."""
    text = json.dumps({"prompt": "a\u2028b", "answer": "ü"}, ensure_ascii=False)
    task = build(b"\xef\xbb\xbf" + text.encode() + b"\r\n" + text.encode())
    assert [p.text for p in task.prompts("train", markers=False)] == ["a\u2028b"] * 2


def test_missing_and_empty_files(tmp_path: Path, build) -> None:
    config = JsonlConfig(kind="jsonl", train="absent.jsonl", eval="absent.jsonl")
    with pytest.raises(ValueError, match=r"task\.train: cannot read .*absent\.jsonl \(No such file"):
        Jsonl(config, recipe_dir=tmp_path)
    for content, limit in ((b"", 0), (b"\n\n", 0), (b"\n\n", 1)):
        with pytest.raises(ValueError, match=r"task\.eval: .*eval\.jsonl holds no rows"):
            build(lines(*GOOD), content, limit=limit)


def test_answered_follows_what_the_prompts_ask_for(build) -> None:
    r"""Prompts that ask for no box would have all answers counted as missing."""
    assert build(lines(*GOOD)).answered("It is 4.") and not build(lines(*GOOD)).answered(" \n")
    boxed = lines({"prompt": r"2 + 2? Answer in \boxed{}.", "answer": "4"})
    task = build(boxed, boxed)
    assert task.answered(r"So \boxed{4}") and not task.answered("It is 4.")


def test_score_is_the_users_business(build) -> None:
    task = build(lines(*GOOD))
    with pytest.raises(ValueError, match=r"reward\.kind: function"):
        task.score(task.prompts("train", markers=False)[0], "4")
