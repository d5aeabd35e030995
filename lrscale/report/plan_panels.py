"""What is drawn of a plan inside one set of axes: memory, the time line of a step, GPUs against step time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrscale.report.chart_style import Ink
from lrscale.report.plan_values import MemoryBar, PlanValues, TimeBar

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
_NARROW, _INVISIBLE = 0.028, 0.002
"""Shares of the axes' width under which a bar has no room for its number, and under which it is nothing to see."""


def memory(ax: Any, bars: Sequence[MemoryBar], limit_gib: float | None, ink: Ink) -> None:
    """A stacked bar a phase, in the order of time, and the line that none may cross."""
    for row, bar in enumerate(bars):
        left = 0.0
        for kind, size in bar.parts.items():
            ax.barh(
                row,
                size,
                left=left,
                height=0.62,
                color=ink[MEMORY_COLOURS[kind]],
                edgecolor=ink["surface"],
                linewidth=0.8,
            )
            left += size
        over = limit_gib is not None and left > limit_gib + 0.01
        ax.text(
            left, row, f" {left:.1f}{' too much' if over else ''}", va="center", ha="left", fontsize=8.5,
            color=ink["discrete"] if over else ink["muted"], fontweight="bold" if over else "normal", zorder=5,
            bbox={"facecolor": ink["surface"], "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    longest = max([bar.total for bar in bars] + [limit_gib or 0.0])
    ax.set_xlim(0, longest * 1.2)
    if limit_gib is not None:
        ax.axvline(limit_gib, color=ink["ink"], linewidth=1.2, linestyle=(0, (4, 2)))
        ax.text(limit_gib, -0.62, f"{limit_gib:.3g} GiB ", va="bottom", ha="right", fontsize=8.5, color=ink["ink"])
    ax.set_yticks(range(len(bars)), [bar.phase for bar in bars], color=ink["ink"])
    ax.set_ylim(len(bars) - 0.5, -0.9)
    ax.set_xlabel("GiB a GPU")
    ax.grid(axis="y", visible=False)


def timeline(ax: Any, bars: Sequence[TimeBar], ink: Ink) -> None:
    """Who is busy with what: a row a role, the number of the step in each bar that has room."""
    start, end = min(bar.start_s for bar in bars), max(bar.end_s for bar in bars)
    bars = [bar for bar in bars if bar.end_s - bar.start_s > _INVISIBLE * (end - start)]
    rows = {role: row for row, (role, _) in enumerate(_roles(bars))}
    size, unit = _unit(end - start)
    for bar in bars:
        left, width = (bar.start_s - start) / size, (bar.end_s - bar.start_s) / size
        colour = TIME_COLOURS.get(bar.phase, TIME_COLOURS["other"])
        ax.barh(
            rows[bar.role], width, left=left, height=0.62, color=ink[colour], edgecolor=ink["surface"], linewidth=0.8
        )
        if bar.phase in ("rollout", "update", "score") and bar.end_s - bar.start_s > _NARROW * (end - start):
            ax.text(
                left + width / 2, rows[bar.role], str(bar.step), ha="center", va="center", fontsize=8,
                color=ink["surface"] if bar.phase != "score" else ink["ink"],
            )  # fmt: skip
    ax.set_yticks(range(len(rows)), [title for _, title in _roles(bars)], color=ink["ink"])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, (end - start) / size)
    ax.set_xlabel(unit)
    ax.grid(axis="y", visible=False)


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
    low, high = 0.5 * min(times), 1.5 * max(times)
    ax.plot(gpus[first:], ideal, color=ink["muted"], linewidth=1.0, linestyle=(0, (4, 3)))
    ax.plot(gpus, times, color=ink["latent"], zorder=3)
    for point, time in zip(points, times, strict=True):
        fill = ink["latent"] if point.fits else ink["surface"]
        ax.plot(
            [point.gpus], [time], "o", color=ink["latent"], markerfacecolor=fill, markeredgewidth=1.6, zorder=4,
            markersize=9 if point.gpus == own else 6.5,
        )  # fmt: skip
        ax.annotate(
            f"{time:.3g}", (point.gpus, time), textcoords="offset points", xytext=(6, 6), ha="left", fontsize=8.5,
            color=ink["ink"], fontweight="bold" if point.gpus == own else "normal",
        )  # fmt: skip
    ax.set_xticks(gpus, [str(count) for count in gpus])
    ax.minorticks_off()
    ax.set_ylim(low, high)
    ticks = [2.0**power for power in range(-6, 24) if low <= 2.0**power <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.margins(x=0.07)
    ax.set_xlabel("GPUs")
    ax.set_ylabel(f"{unit} a step")


def legend(figure: Any, colours: Mapping[str, str], shown: Sequence[str], ink: Ink) -> None:
    """What the colours mean, of those that are there, below the axes."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=ink[colour], label=name) for name, colour in colours.items() if name in shown]
    figure.legend(handles=handles, loc="outside lower left", ncols=min(6, len(handles)), handlelength=1.0)


def _roles(bars: Sequence[TimeBar]) -> list[tuple[str, str]]:
    there = {bar.role for bar in bars}
    return [(role, title) for role, title in ROLES if role in there]


def _unit(seconds: float) -> tuple[float, str]:
    """Seconds in a unit in which they read well, and its name."""
    for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, unit
    return 1.0, "seconds"
