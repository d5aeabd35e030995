"""The charts of a plan: for the page of a run, and as PNG files of `lrscale plan --charts`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lrscale.report import plan_panels as panels
from lrscale.report.chart_style import PAGE_INK, PNG_INK, Ink
from lrscale.report.charts import Chart, chart_of, figure_of, save_png, style
from lrscale.report.plan_values import PlanValues, plan_values

_WIDTH = 8.0


def plan_charts(plan: Mapping[str, Any], name: str) -> list[Chart]:
    """Those that the plan has numbers for, for the page; `name` is unique on it."""
    values = plan_values(plan)
    return [chart_of(draw(values, PAGE_INK), f"{name}-{kind}", caption) for kind, _, caption, draw in _drawn(values)]


def write_plan_charts(plan: Mapping[str, Any], folder: Path, subject: str) -> list[Path]:
    """plan-memory.png, plan-step.png and plan-scaling.png, as far as the plan has numbers for them.

    `subject` says whose plan it is, in the titles. Raises ChartsMissing without matplotlib, OSError where the folder
    cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values, written = plan_values(plan), []
    for kind, title, _, draw in _drawn(values):
        figure = draw(values, PNG_INK)
        path = folder / f"plan-{kind}.png"
        save_png(figure, path, f"{title} · {subject}")
        written.append(path)
    return written


Draw = Callable[[PlanValues, Ink], Any]


def _drawn(values: PlanValues) -> Iterator[tuple[str, str, str, Draw]]:
    """(short name, title, caption, how to draw it) of the charts that there are numbers for."""
    if values.memory:
        yield (
            "memory",
            "Memory of a GPU by phase",
            "Memory of a GPU as planned, phase by phase; the dashed line is what it has. Buffers: reduce and gather "
            "buckets, persistent parameters, whole tensors on their way.",
            _memory,
        )
    if values.timeline:
        how = "The first steps of a simulated run" if values.simulated else "A step at its mean seconds, as planned"
        yield (
            "step",
            "Time line of the first steps" if values.simulated else "Time line of a step",
            f"{how}; numbers are those of the steps. What comes every so many steps is drawn where it falls"
            f"{'' if values.simulated else ' with its share of each'}.",
            _timeline,
        )
    if len(values.scaling) > 1:
        yield (
            "scaling",
            "Time of a step by GPUs",
            "Planned time of a step on fewer and more GPUs, the sequences of a step being the same. Hollow: does not fit "
            "into memory. Dashed: twice the GPUs, half the time. Large: the layout that was planned.",
            _scaling,
        )


def _memory(values: PlanValues, ink: Ink) -> Any:
    figure = figure_of(ink, _WIDTH, 1.6 + 0.34 * len(values.memory))
    with style(ink):
        panels.memory(figure.add_subplot(), values.memory, values.limit_gib, ink)
        shown = [kind for bar in values.memory for kind, size in bar.parts.items() if size >= 0.05]
        panels.legend(figure, panels.MEMORY_COLOURS, shown, ink)
    return figure


def _timeline(values: PlanValues, ink: Ink) -> Any:
    figure = figure_of(ink, _WIDTH, 2.8)
    with style(ink):
        panels.timeline(figure.add_subplot(), values.timeline, ink)
        shown = [bar.phase if bar.phase in panels.TIME_COLOURS else "other" for bar in values.timeline]
        panels.legend(figure, panels.TIME_COLOURS, shown, ink)
    return figure


def _scaling(values: PlanValues, ink: Ink) -> Any:
    figure = figure_of(ink, _WIDTH, 3.6)
    with style(ink):
        panels.scaling(figure.add_subplot(), values, ink)
    return figure
