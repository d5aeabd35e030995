"""The chart: accuracy against length, a dot a seed, an arrow an arm from before RL to after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.science.figures import ArmFigures
from lrscale.report.chart_style import ARM_MARKERS, COLOURS
from lrscale.report.runs import arm_title


def draw_scatter(figures: Sequence[ArmFigures], path: Path) -> None:
    """Write a PNG. Needs matplotlib (the `charts` extra)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for arm in dict.fromkeys(item.arm for item in figures):
        of_arm = [item for item in figures if item.arm == arm]
        colour = COLOURS.get(arm, COLOURS["other_arm"])[0]
        for item in of_arm:
            axes.plot(
                item.after.length_mean,
                100 * item.after.accuracy,
                ARM_MARKERS.get(arm, "o"),
                color=colour,
                alpha=0.45,
                markersize=5,
                markeredgewidth=0,
            )
        start = (mean(i.before.length_mean for i in of_arm), 100 * mean(i.before.accuracy for i in of_arm))
        end = (mean(i.after.length_mean for i in of_arm), 100 * mean(i.after.accuracy for i in of_arm))
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6})
        axes.plot(*end, ARM_MARKERS.get(arm, "o"), color=colour, markersize=9, label=arm_title(arm))
        axes.plot(*start, ARM_MARKERS.get(arm, "o"), markerfacecolor="white", color=colour, markersize=7)
    axes.axhline(50, color=COLOURS["muted"][0], linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.set_xlabel("length of a completion: tokens plus latent steps")
    axes.set_ylabel("accuracy on held-out stories, %")
    axes.set_title("Before RL (hollow) and after (filled); small: single seeds; dotted: chance", fontsize=10)
    axes.grid(color=COLOURS["grid"][0], linewidth=0.6)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
