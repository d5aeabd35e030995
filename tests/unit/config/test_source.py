"""YAML: scalars as people mean them, nothing said twice, every fault with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lrscale.config.compose import compose, read_overrides
from lrscale.config.errors import RecipeError
from lrscale.config.source import parse, read_file


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5e3", 5e3),
        ("1_000", "1_000"),
        ("010", 10),
        ("0x1F", 31),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("1:30:00", "1:30:00"),
        ("2026-01-01", "2026-01-01"),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ("-.5", -0.5),
    ],
)
def test_scalars_of_yaml_1_2(text: str, value: Any) -> None:
    """Locks out YAML 1.1: `1e-4` as text, `no` as false, `1:30:00` as 5400."""
    found = parse(f"key: {text}", "a.yaml").values["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a is given twice, first at a.yaml:1"),
        ("- 1\n", 1, "a recipe is a mapping"),
        ("just text", 1, "a recipe is a mapping"),
        ("a: [1, 2\n", 2, "this is not YAML"),
        ("a:\n\t- 1\n", 2, "this is not YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "is not allowed"),
        ("a: !!binary aGk=\n", 1, "the tag tag:yaml.org,2002:binary is not allowed"),
        ("a: &x\n  b: *x\n", 1, "inside the value that it repeats"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n", 3, "'<<' is not"),
        ("? [1]\n: 2\n", 1, "a key is plain text"),
        ("a: 1\n---\nb: 2\n", 2, "this is not YAML"),
    ],
)
def test_faults_have_their_line(text: str, line: int, message: str) -> None:
    """Locks out silent winners of duplicate keys, code in recipes, and endless aliases."""
    with pytest.raises(RecipeError) as caught:
        parse(text, "a.yaml")
    assert caught.value.problems[0].place.line == line
    assert message in caught.value.problems[0].message


def test_empty_recipes_are_recipes() -> None:
    assert parse("", "a.yaml").values == parse("# nothing\n", "a.yaml").values == {}


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"name: \xff")
    for path in (tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            read_file(path)


def test_sections_merge_and_lists_are_replaced() -> None:
    """Locks out lists that grow, and stale places of a longer list below a shorter one."""
    merged = compose([parse("task: {events: [3, 4], characters: 2}", "a"), parse("task: {events: [5, 6]}", "b")])
    assert merged.values == {"task": {"events": [5, 6], "characters": 2}}
    assert str(merged.places["task", "events", 1]) == "b:1"


@pytest.mark.parametrize("base", ["task: {kind: flawed_stories, events: [3, 4]}", "task: {events: [3, 4]}"])
def test_another_kind_replaces_its_section(base: str) -> None:
    """Locks out keys of the old kind that the new one refuses, the default kind included."""
    merged = compose([parse(base, "a"), parse("task: {kind: flawed_fictions}", "b")])
    assert merged.values == {"task": {"kind": "flawed_fictions"}}
    assert ("task", "events") not in merged.places


def test_another_kind_of_rollout_keeps_how_to_sample() -> None:
    """Locks out `--set rollout.kind=vllm` that quietly sets the recipe's max_new_tokens back to its default."""
    base = parse("rollout: {max_new_tokens: 160}\nreward: {length_penalty: {price_per_100: 0.1}}", "a")
    merged = compose([base, parse("rollout: {kind: vllm}\nreward: {kind: function, path: r.py}", "b")])
    assert merged.values["rollout"] == {"max_new_tokens": 160, "kind": "vllm"}
    assert merged.values["reward"] == {"kind": "function", "path": "r.py"}  # a price is in units of its own reward


def test_the_same_kind_merges() -> None:
    merged = compose([parse("task: {events: [3, 4]}", "a"), parse("task: {kind: flawed_stories}", "b")])
    assert merged.values["task"] == {"events": [3, 4], "kind": "flawed_stories"}


def test_kind_may_stand_after_the_keys_that_it_needs() -> None:
    """Locks out overrides whose order matters: `task.train` before `task.kind=jsonl`."""
    over = read_overrides(["task.train=a", "task.kind=jsonl"])
    assert over.values == {"task": {"train": "a", "kind": "jsonl"}}


def test_of_one_key_set_twice_the_last_counts() -> None:
    assert read_overrides(["seed=1", "seed=2"]).values == {"seed": 2}


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", "a.b.=3", "--x=3", "a b=3"])
def test_what_is_no_override(override: str) -> None:
    with pytest.raises(RecipeError, match="key=value"):
        read_overrides([override])


def test_all_bad_overrides_are_named() -> None:
    with pytest.raises(RecipeError) as caught:
        read_overrides(["x", "seed=[", "task=3", "task.kind=jsonl"])
    assert len(caught.value.problems) == 3
