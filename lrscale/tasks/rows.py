"""Rows of the user's data: read, checked, and every broken one reported with its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, as the policy will read it (chat template applied where the recipe has one)."""

SHOWN_PROBLEMS = 20


class RowProblems:
    """Collects what is wrong with rows, so that all of it is told at once. Nothing is ever dropped."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def add(self, place: str, problem: str) -> None:
        """One broken row; `place` is `file:line`."""
        self._problems.append(f"{place}: {problem}")

    def raise_if_any(self, key: str) -> None:
        """ValueError with the first problems and their number; `key` names the recipe's key."""
        if not self._problems:
            return
        shown = self._problems[:SHOWN_PROBLEMS]
        hidden = len(self._problems) - len(shown)
        lines = [f"{key}: {len(self._problems)} broken row{'s' if len(self._problems) > 1 else ''}", *shown]
        if hidden:
            lines.append(f"... and {hidden} more")
        lines.append("Mend or remove these rows; none is dropped in silence.")
        raise ValueError("\n  ".join(lines[:-1]) + "\n" + lines[-1])


def text_problem(value: object, name: str) -> str | None:
    """Why a value cannot be the text called `name`; None where it can."""
    if not isinstance(value, str):
        return f"{name!r} is {_kind(value)}, needed a text"
    if not value.strip():
        return f"{name!r} is empty"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"{name!r} holds half a surrogate pair at character {error.start}, which no UTF-8 text can hold"
    return None


def length_problem(
    text: str, encode: Encode | None, limit: int, limit_key: str, *, without_markers: str | None = None
) -> str | None:
    """Why a prompt is too long; None where it is not, or where there is no tokenizer to tell.

    `without_markers`: the prompt without the marker paragraph, where that can be left out.
    """
    if encode is None:
        return None
    tokens = len(encode(text))
    if tokens <= limit:
        return None
    markers = 0 if without_markers is None else tokens - len(encode(without_markers))
    named = f", {markers} of them the marker paragraph (task.marker_paragraph: false leaves it out)" if markers else ""
    return f"the prompt has {tokens} tokens{named}; {limit_key} allows {limit}"


def read_jsonl(path: Path, key: str, problems: RowProblems, *, limit: int = 0) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers (from 1); broken lines go to `problems`.

    `limit` lines are read at most, 0 reads all. Blank lines at the end are no rows. Raises ValueError,
    naming the recipe's `key`, for a file that cannot be read or holds no rows.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    blank: list[int] = []
    empty = True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if limit and number > limit:
                    break
                if not line.strip():
                    blank.append(number)
                    continue
                for earlier in blank:
                    problems.add(f"{path}:{earlier}", "the line is empty")
                blank.clear()
                empty = False
                try:
                    rows.append((number, _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)))
                except (ValueError, RecursionError) as error:
                    problems.add(f"{path}:{number}", _reason(error))
    except OSError as error:
        raise ValueError(
            f"{key}: cannot read {path} ({error.strerror}). Needed: a file with one JSON object a line; "
            "a relative path starts at the recipe's folder."
        ) from error
    if empty:
        raise ValueError(f"{key}: {path} holds no rows. Needed: one JSON object a line.")
    return rows


def check_utf8(path: Path, problems: RowProblems) -> bool:
    """Whether a text file is UTF-8; each line that is not goes to `problems`."""
    fine = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                problems.add(f"{path}:{number}", _reason(error))
                fine = False
    return fine


def _parse(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_key_twice)
    if not isinstance(row, dict):
        raise ValueError(f"the line is {_kind(row)}, needed an object {{...}}")
    return row


def _reason(error: Exception) -> str:
    match error:
        case UnicodeDecodeError():
            return f"not UTF-8 at byte {error.start + 1} of the line (0x{error.object[error.start]:02x})"
        case json.JSONDecodeError():
            return f"not JSON: {error.msg} at character {error.colno}"
        case RecursionError():
            return "not JSON that can be read: nested too deeply"
        case _:
            return str(error)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no JSON value")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there more than once")
    return row


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return type(value).__name__
