"""Options that are numbers: finite and within their limits, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import typer

_MOST = 1e12
"""Beyond any count, price or time, and sums and products of such numbers stay finite."""


def number(*names: str, help: str, least: float = 0.0, most: float = _MOST, below: float | None = None) -> Any:
    """For `Annotated[float | None, number(...)]`.

    Args:
        names: `--option`; none: that of the parameter.
        help: What it is.
        least: The smallest that is taken.
        most: The largest.
        below: In place of `most`, where the limit itself is not taken.
    """
    return typer.Option(*names, parser=_parser(least, most, below), metavar="NUMBER", help=help)


def _parser(least: float, most: float, below: float | None) -> Callable[[str], float]:
    limit = f"below {below:g}" if below is not None else f"at most {most:g}"

    def parsed(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or (below is not None and value >= below):
            raise typer.BadParameter(f"given {text}, needed a number of at least {least:g} and {limit}")
        return value

    return parsed
