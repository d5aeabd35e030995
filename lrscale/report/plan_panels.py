"""What is drawn of a plan inside one set of axes: memory, the time line of a step, GPUs against step time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lrscale.report.chart_style import Ink
from lrscale.report.plan_values import PlanValues, TimeBar

MEMORY_COLOURS = {
    "states": "phase-1",
    "buffers": "phase-3",
    "gathered weights": "phase-5",
    "activations": "phase-2",
    "logits": "discrete",
    "latents": "latent",
    "optimizer step": "shuffled_latent",
    "engine weights": "phase-4",
    "cache": "zero_latent",
    "allowance": "phase-6",
}
TIME_COLOURS = {
    "rollout": "phase-1",
    "rollout, some engines idle": "phase-3",
    "score": "phase-2",
    "log-probs": "discrete",
    "update": "latent",
    "refresh": "shuffled_latent",
    "publish": "zero_latent",
    "checkpoint": "phase-4",
    "other": "phase-6",
}
ROLES = (("generate", "engines"), ("score", "scoring"), ("train", "trainer"))
_NARROW, _INVISIBLE = 0.028, 0.003
"""Shares of the axes' width under which a bar has no room for its number, and under which it is nothing to see."""
_LEGEND_COLUMNS = 6
_CHARACTER = 0.01
"""Of the axes' width, which a character of a total takes at most."""


def memory(ax: Any, plan: PlanValues, ink: Ink) -> set[str]:
    """A stacked bar a phase, in the order of time, and the line that none may cross. Returns the parts to be seen."""
    small, shown = plan.small, set()
    unit, of_gib, limit = ("MiB", 1024.0, None) if small else ("GiB", 1.0, plan.limit_gib)
    totals = [of_gib * (bar.planned if small else bar.total) for bar in plan.memory]
    width = 1.2 * max([*totals, limit or 0.0])
    for row, (bar, total) in enumerate(zip(plan.memory, totals, strict=True)):
        left = 0.0
        for kind, gib in bar.parts.items():
            if small and kind == "allowance":
                continue
            size = of_gib * gib
            if size > _INVISIBLE * width:
                _bar(ax, row, left, size, ink[MEMORY_COLOURS[kind]], ink)
                shown.add(kind)
            left += size
        over = limit is not None and total > limit + 0.01
        text = f" {total:.1f}{' too much' if over else ''}"
        across = limit is not None and total <= limit < total + _CHARACTER * len(text) * width
        ax.text(
            limit if across else total, row, text, va="center", ha="left", fontsize=8.5,
            color=ink["discrete"] if over else ink["muted"], fontweight="bold" if over else "normal",
        )  # fmt: skip
    if limit is not None:
        ax.axvline(limit, color=ink["surface"], linewidth=2.2)  # the dashes are seen on dark bars too
        ax.axvline(limit, color=ink["ink"], linewidth=1.2, linestyle=(0, (4, 2)))
        side = "right" if limit > width / 2 else "left"
        ax.text(limit, -0.62, f" a GPU has {limit:.3g} GiB ", va="bottom", ha=side, fontsize=8.5, color=ink["ink"])
    ax.set_xlim(0, width)
    ax.set_yticks(range(len(totals)), [bar.phase for bar in plan.memory], color=ink["ink"])
    ax.set_ylim(len(totals) - 0.5, -0.9)
    ax.set_xlabel(f"{unit} a GPU")
    ax.grid(axis="y", visible=False)
    return shown


def timeline(ax: Any, bars: Sequence[TimeBar], ink: Ink) -> set[str]:
    """Who is busy with what: a row a role, the number of the step in each bar that has room. Returns what is to be seen."""
    start, end = min(bar.start_s for bar in bars), max(bar.end_s for bar in bars)
    roles = _roles(bars)
    rows = {role: row for row, (role, _) in enumerate(roles)}
    bars = [bar for bar in bars if bar.end_s - bar.start_s > _INVISIBLE * (end - start)]
    size, unit = _unit(end - start)
    for bar in bars:
        left, width = (bar.start_s - start) / size, (bar.end_s - bar.start_s) / size
        _bar(ax, rows[bar.role], left, width, ink[TIME_COLOURS[_phase(bar)]], ink)
        if bar.phase in ("rollout", "update", "score") and bar.end_s - bar.start_s > _NARROW * (end - start):
            ax.text(
                left + width / 2, rows[bar.role], str(bar.step), ha="center", va="center", fontsize=8,
                color=ink["surface"] if bar.phase != "score" else ink["ink"],
            )  # fmt: skip
    ax.set_yticks(range(len(rows)), [title for _, title in roles], color=ink["ink"])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, (end - start) / size)
    ax.set_xlabel(unit)
    ax.grid(axis="y", visible=False)
    return {_phase(bar) for bar in bars}


def scaling(ax: Any, plan: PlanValues, ink: Ink) -> None:
    """GPUs against step time, both doubling; hollow where memory does not suffice, dashed: twice the GPUs, half the time."""
    points, own = plan.scaling, plan.gpus
    gpus, seconds = [point.gpus for point in points], [point.step_s for point in points]
    size, unit = _unit(min(seconds))
    times = [value / size for value in seconds]
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    first = next((k for k, point in enumerate(points) if point.fits), 0)
    ideal = [times[first] * gpus[first] / count for count in gpus[first:]]
    ax.plot(gpus[first:], ideal, color=ink["muted"], linewidth=1.0, linestyle=(0, (4, 3)))
    ax.plot(gpus, times, color=ink["latent"], zorder=3)
    for point, time in zip(points, times, strict=True):
        fill = ink["latent"] if point.fits else ink["surface"]
        ax.plot(
            [point.gpus], [time], "o", color=ink["latent"], markerfacecolor=fill, markeredgewidth=1.6, zorder=4,
            markersize=9 if point.gpus == own else 6.5,
        )  # fmt: skip
        ax.annotate(
            f"{time:#.3g}" if time < 100 else f"{time:,.0f}", (point.gpus, time), textcoords="offset points",
            xytext=(2, 7), ha="left", fontsize=8.5, color=ink["ink"],
            fontweight="bold" if point.gpus == own else "normal",
        )  # fmt: skip
    ax.set_xticks(gpus, [str(count) for count in gpus])
    ax.minorticks_off()
    low, high = 0.8 * min(times + ideal), 1.7 * max(times)
    ax.set_ylim(low, high)
    ticks = [2.0**power for power in range(-12, 24) if low <= 2.0**power <= high]
    ticks = ticks[:: 1 + len(ticks) // 10]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.margins(x=0.07)
    ax.set_xlabel("GPUs")
    ax.set_ylabel(f"{unit} a step")


def legend(figure: Any, colours: Mapping[str, str], shown: Collection[str], ink: Ink) -> None:
    """What the colours mean, of those that are there, below the axes."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=ink[colour], label=name) for name, colour in colours.items() if name in shown]
    rows = -(-len(handles) // _LEGEND_COLUMNS)
    figure.legend(handles=handles, loc="outside lower left", ncols=-(-len(handles) // rows), handlelength=1.0)


def _bar(ax: Any, row: int, left: float, width: float, colour: str, ink: Ink) -> None:
    ax.barh(row, width, left=left, height=0.62, color=colour, edgecolor=ink["surface"], linewidth=0.8)


def _phase(bar: TimeBar) -> str:
    return bar.phase if bar.phase in TIME_COLOURS else "other"


def _roles(bars: Sequence[TimeBar]) -> list[tuple[str, str]]:
    there = {bar.role for bar in bars}
    return [(role, title) for role, title in ROLES if role in there]


def _unit(seconds: float) -> tuple[float, str]:
    """Seconds in a unit in which they read well, and its name."""
    for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, unit
    return 1.0, "seconds"
