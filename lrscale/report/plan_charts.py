"""The charts of a plan: for the page of a run, and as PNG files of `lrscale plan --charts`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lrscale.report import plan_panels as panels
from lrscale.report.chart_style import PAGE_INK, PNG_INK, Ink
from lrscale.report.charts import Chart, chart_of, figure_of, save_png, style
from lrscale.report.plan_values import PlanValues, plan_values

_WIDTH, _CAPTION_INCHES = 8.0, 0.4


def plan_charts(plan: Mapping[str, Any], name: str) -> list[Chart]:
    """Those that the plan has numbers for, for the page; `name` is unique on it."""
    values = plan_values(plan)
    return [chart_of(draw(values, PAGE_INK), f"{name}-{kind}", caption) for kind, _, caption, draw in _drawn(values)]


def write_plan_charts(plan: Mapping[str, Any], folder: Path, subject: str) -> list[Path]:
    """plan-memory.png, plan-step.png and plan-scaling.png, as far as the plan has numbers for them.

    `subject` says whose plan it is, in the titles; captions stand below them. Raises ChartsMissing without matplotlib,
    OSError where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values, written = plan_values(plan), []
    for kind, title, caption, draw in _drawn(values):
        figure = draw(values, PNG_INK)
        figure.set_figheight(figure.get_figheight() + _CAPTION_INCHES)
        with style(PNG_INK):
            figure.axes[0].set_title(
                textwrap.fill(caption, 105), fontsize=8.5, fontweight="normal", color=PNG_INK["muted"]
            )
        path = folder / f"plan-{kind}.png"
        save_png(figure, path, f"{title} · {subject}")
        written.append(path)
    return written


Draw = Callable[[PlanValues, Ink], Any]


def _drawn(values: PlanValues) -> Iterator[tuple[str, str, str, Draw]]:
    """(short name, title, caption, how to draw it) of the charts that there are numbers for."""
    if values.memory:
        yield "memory", *_of_memory(values), _memory
    if values.timeline:
        yield "step", *_of_timeline(values), _timeline
    if len(values.scaling) > 1:
        yield (
            "scaling",
            "Time of a step by GPUs",
            "Planned time of a step on fewer and more GPUs, the sequences of a step being the same. Hollow: does not fit "
            "into memory. Dashed: twice the GPUs, half the time. Large: the layout that was planned.",
            _scaling,
        )


def _of_memory(values: PlanValues) -> tuple[str, str]:
    """Title and caption."""
    title, caption = "Memory of a GPU by phase", "Memory of a GPU as planned, phase by phase"
    limit, allowance = values.limit_gib, max(bar.total - bar.planned for bar in values.memory)
    if values.small:
        has = "" if limit is None else f", of the {limit:g} GiB that it has"
        return f"{title}, without allowance", f"{caption}. Left out: {allowance:.3g} GiB for fragmentation{has}."
    line = "" if limit is None else "; the dashed line is what it has"
    buffers = "Buffers: reduce and gather buckets, persistent parameters, whole tensors on their way."
    return title, f"{caption}{line}. {buffers}"


def _of_timeline(values: PlanValues) -> tuple[str, str]:
    """Title and caption."""
    seldom = " and ".join(f"{name} (every {steps} steps)" for name, steps in values.every_steps.items())
    if values.simulated:
        title, how = "Time line of steps {} to {}, simulated".format(*values.simulated), "Of a simulated run"
        where = "drawn where they come"
    else:
        several = len({bar.step for bar in values.timeline}) > 1
        title = "Time line, one step off policy" if several else "Time line of a step"
        how, where = "At mean seconds, as planned", "drawn in every step with their share of it"
    return title, f"{how}; numbers are those of the steps.{f' Not in every step: {seldom}, {where}.' if seldom else ''}"


def _memory(values: PlanValues, ink: Ink) -> Any:
    figure = figure_of(ink, _WIDTH, 1.6 + 0.34 * len(values.memory))
    with style(ink):
        panels.legend(figure, panels.MEMORY_COLOURS, panels.memory(figure.add_subplot(), values, ink), ink)
    return figure


def _timeline(values: PlanValues, ink: Ink) -> Any:
    figure = figure_of(ink, _WIDTH, 2.8)
    with style(ink):
        panels.legend(figure, panels.TIME_COLOURS, panels.timeline(figure.add_subplot(), values.timeline, ink), ink)
    return figure


def _scaling(values: PlanValues, ink: Ink) -> Any:
    figure = figure_of(ink, _WIDTH, 3.6)
    with style(ink):
        panels.scaling(figure.add_subplot(), values, ink)
    return figure
