"""What is drawn inside one set of axes; charts.py puts panels together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lrscale.report.chart_style import ARM_MARKERS, Ink, run_dash
from lrscale.report.phases import PHASE_ORDER, stage_times
from lrscale.report.runs import Run, arm_title
from lrscale.report.summary import ArmSummary, evaluation, heldout_losses

CURVES = (
    ("reward_mean", "Reward"),
    ("accuracy", "Accuracy, %"),
    ("tokens_mean", "Discrete tokens"),
    ("latent_steps_mean", "Latent steps"),
)
"""Field of the `rl` lines and title; a field with `%` in its title is a share."""


def accuracy_against_length(ax: Any, arms: Sequence[ArmSummary], ink: Ink) -> None:
    """Hollow point before, arrow, filled point after, each with its 95 % bar."""
    runs = list({id(arm.run): arm.run for arm in arms}.values())
    for arm in arms:
        colour, marker = ink[arm.arm], ARM_MARKERS.get(arm.arm, "o")
        for item, filled in ((arm.before, False), (arm.after, True)):
            if item is None:
                continue
            centre = 100 * item.accuracy
            ax.errorbar(
                item.length_mean, centre,
                yerr=[[max(0.0, centre - 100 * item.low)], [max(0.0, 100 * item.high - centre)]],
                fmt=marker, markersize=8, color=colour, markerfacecolor=colour if filled else ink["surface"],
                markeredgecolor=colour, markeredgewidth=1.6, elinewidth=1.1, capsize=2.5, alpha=1.0 if filled else 0.75,
                zorder=4 if filled else 3,
            )  # fmt: skip
        if arm.before and arm.after:
            ax.annotate(
                "", xy=(arm.after.length_mean, 100 * arm.after.accuracy),
                xytext=(arm.before.length_mean, 100 * arm.before.accuracy),
                arrowprops={
                    "arrowstyle": "-|>", "color": colour, "linewidth": 1.3, "alpha": 0.6, "shrinkA": 6, "shrinkB": 6,
                    "linestyle": run_dash(runs.index(arm.run)),
                },
            )  # fmt: skip
    ax.set_xlabel("positions a completion (discrete tokens + latent steps)")
    ax.set_ylabel("accuracy, %")
    ax.margins(x=0.08, y=0.08)


def curve(ax: Any, runs: Sequence[Run], field: str, title: str, ink: Ink) -> None:
    """A field of the `rl` lines over the steps, every arm of every run."""
    scale = 100.0 if "%" in title else 1.0
    for number, run in enumerate(runs):
        for arm in run.arms:
            points = [
                (line["step"], scale * line[field]) for line in run.lines("rl", arm=arm) if line.get(field) is not None
            ]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            ax.plot(steps, values, color=ink[arm], linewidth=0.8, alpha=0.25)
            means = running_mean(values, max(1, len(values) // 20))
            marker = ARM_MARKERS.get(arm, "o") if len(values) == 1 else ""  # a line through one point shows nothing
            ax.plot(steps, means, color=ink[arm], linestyle=run_dash(number), marker=marker)
            seen = [
                evaluation(line)
                for line in run.lines("evaluate", arm=arm, when="during")
                if line.get("accuracy") is not None
            ]
            if seen and hasattr(seen[0], field):
                heights = [scale * getattr(item, field) for item in seen]
                ax.plot(
                    [item.step for item in seen], heights, ARM_MARKERS.get(arm, "o"), color=ink[arm], markersize=4.5
                )
    ax.set_title(title)
    ax.set_xlabel("RL step")


def shared_legend(figure: Any, runs: Sequence[Run], ink: Ink, *, place: str = "upper left") -> None:
    """One legend of arms, and of runs where there are several, outside the panels."""
    names = dict.fromkeys(
        arm for run in runs for arm in run.arms if run.lines("rl", arm=arm) or run.lines("evaluate", arm=arm)
    )
    handles = [_line_handle(arm_title(name), ink[name], marker=ARM_MARKERS.get(name, "o")) for name in names]
    if len(runs) > 1:
        handles += [
            _line_handle(literal(run.label), ink["muted"], dash=run_dash(number)) for number, run in enumerate(runs)
        ]
    figure.legend(handles=handles, loc=f"outside {place}", ncols=min(4, len(handles)))


def histogram(ax: Any, arm: ArmSummary, field: str, ink: Ink) -> None:
    """Shares before (outlined) and after (filled), side by side."""
    found = [
        (item, filled) for item, filled in ((arm.before, False), (arm.after, True)) if item and getattr(item, field)
    ]
    for item, filled in found:
        counts: dict[int, int] = getattr(item, field)
        total = sum(counts.values()) or 1
        shift = 0.2 if filled else -0.2
        ax.bar(
            [key + shift for key in sorted(counts)], [counts[key] / total for key in sorted(counts)], width=0.36,
            facecolor=ink[arm.arm] if filled else "none", edgecolor=ink[arm.arm], linewidth=1.1,
        )  # fmt: skip
    ax.set_title(arm_title(arm.arm) if field == "marker_histogram" else "", color=ink[arm.arm])
    ax.set_xlabel("markers" if field == "marker_histogram" else "N")
    ax.grid(axis="x", visible=False)
    _whole_numbers(ax)


def sft_curve(ax: Any, run: Run, field: str, title: str, ink: Ink) -> None:
    """A field of the first projector SFT over its steps."""
    lines = run.lines("projector_sft", arm=None)
    points = [(line["step"], line[field]) for line in lines if line.get(field) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        ax.plot(steps, values, color=ink["ink"], linewidth=0.8, alpha=0.3)
        means = running_mean(values, max(1, len(values) // 20))
        ax.plot(steps, means, color=ink["ink"], marker="o" if len(values) == 1 else "")
        if field == "latent_scale":
            ax.axhline(1.0, color=ink["muted"], linewidth=0.8, linestyle=(0, (3, 3)))
            if max(values) > 30 * max(min(values), 1e-30):
                ax.set_yscale("log")
    else:
        _nothing(ax, ink)
    ax.set_title(title)
    ax.set_xlabel("SFT step")


def heldout(ax: Any, run: Run, ink: Ink) -> None:
    """Held-out loss with real, zeroed and shuffled latents over the refreshes; one colour an arm."""
    losses = heldout_losses(run)
    first = [item for item in losses if item.arm is None][-1:]
    arms = list(dict.fromkeys(item.arm for item in losses if item.arm is not None))
    kinds = (("loss_real", "solid", "o"), ("loss_zero", (0, (4, 2)), "^"), ("loss_shuffled", (0, (1.5, 1.5)), "D"))
    for arm in arms or [None]:
        items = first + [item for item in losses if item.arm == arm and arm is not None]
        for field, dash, marker in kinds:
            points = [
                (item.refresh, getattr(item, field), item.loss_real_se)
                for item in items
                if getattr(item, field) is not None
            ]
            if points:
                xs, ys, errors = zip(*points, strict=True)
                bars = [error or 0.0 for error in errors] if field == "loss_real" else None
                colour = ink[arm] if arm else ink["ink"]
                ax.errorbar(
                    xs,
                    ys,
                    yerr=bars,
                    color=colour,
                    linestyle=dash,
                    marker=marker,
                    markersize=4,
                    capsize=2,
                    linewidth=1.3,
                )
    if losses:
        handles = [
            _line_handle(field.removeprefix("loss_"), ink["muted"], dash=dash, marker=marker)
            for field, dash, marker in kinds
        ]
        ax.legend(
            handles=handles,
            loc="upper center",
            ncols=3,
            fontsize=8,
            columnspacing=1.0,
            handlelength=2.2,
            handletextpad=0.4,
        )
    else:
        _nothing(ax, ink)
    ax.set_title("Held-out loss")
    ax.set_xlabel("refresh")
    ax.margins(x=0.1, y=0.1)
    if losses:
        bottom, top = ax.get_ylim()
        ax.set_ylim(bottom, top + 0.16 * (top - bottom))  # room for the legend
        _whole_numbers(ax)


def phases(ax: Any, runs: Sequence[Run], ink: Ink) -> None:
    """Stacked bars of wall minutes."""
    rows = [(run, time) for run in runs for time in stage_times(run)]
    known = [*PHASE_ORDER, "other"]
    shown: dict[str, str] = {}
    for row, (_, time) in enumerate(rows):
        left = 0.0
        for phase, seconds in time.seconds.items():
            number = known.index(phase) if phase in known else known.index("other")
            label = phase if phase in known else "other"
            shown[label] = ink[f"phase-{number + 1}"]
            ax.barh(
                row, seconds / 60, left=left, height=0.62, color=shown[label], edgecolor=ink["surface"], linewidth=0.8
            )
            left += seconds / 60
        ax.text(left, row, f"  {left:.1f}", va="center", ha="left", fontsize=8.5, color=ink["muted"])
    names = [time.name if len(runs) == 1 else f"{run.label} · {time.name}" for run, time in rows]
    ax.set_yticks(range(len(rows)), [literal(name) for name in names], color=ink["ink"])
    ax.invert_yaxis()
    ax.set_xlabel("minutes")
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.06)
    handles = [_patch_handle(name, shown[name]) for name in known if name in shown]
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(handles),
        handlelength=1.0,
        borderaxespad=0.2,
    )


def running_mean(values: Sequence[float], half_width: int) -> list[float]:
    """Mean over the value and up to `half_width` neighbours on either side."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, k - half_width), min(len(values), k + half_width + 1)) for k in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def literal(text: str) -> str:
    """matplotlib reads $...$ as mathematics; names of runs are no formulas."""
    return text.replace("$", r"\$")


def _whole_numbers(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _nothing(ax: Any, ink: Ink) -> None:
    ax.text(0.5, 0.5, "not measured yet", transform=ax.transAxes, ha="center", va="center", color=ink["muted"])
    ax.set_xticks([])
    ax.set_yticks([])


def _line_handle(label: str, colour: str, *, dash: Any = "solid", marker: str = "") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=dash, marker=marker, label=label)


def _patch_handle(label: str, colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, label=label)
