r"""Reading the final answer out of a completion: the last `\boxed{...}`."""

from __future__ import annotations

from typing import Literal

_OPENING = r"\boxed{"


def boxed_answer(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}`, stripped; None where there is none.

    Braces inside are kept when they balance (`\boxed{\text{Yes}}`). A box that is never
    closed (a completion cut by its length limit) does not count.
    """
    start = text.rfind(_OPENING)
    while start >= 0:
        end = _closing_brace(text, start + len(_OPENING))
        if end is not None:
            return text[start + len(_OPENING) : end].strip()
        start = text.rfind(_OPENING, 0, start)
    return None


def yes_or_no(text: str) -> Literal["Yes", "No"] | None:
    r"""The boxed answer where it is Yes or No (any case, a full stop or `\text{}` around it allowed), else None."""
    answer = boxed_answer(text)
    if answer is None:
        return None
    if answer.startswith(r"\text{") and answer.endswith("}"):
        answer = answer[len(r"\text{") : -1]
    match answer.strip().removesuffix(".").casefold():
        case "yes":
            return "Yes"
        case "no":
            return "No"
        case _:
            return None


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for index in range(start, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return index
    return None
