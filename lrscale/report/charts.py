"""Charts of one or several runs, as inline SVG for the page and as one PNG.

Needs matplotlib (the `charts` extra), imported only when something is drawn. Figures are made
without pyplot: no global state, no window, no display.
"""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.report import panels
from lrscale.report.chart_style import PAGE_INK, PNG_INK, Ink, rc_params, themed
from lrscale.report.phases import stage_times
from lrscale.report.runs import Run
from lrscale.report.summary import ArmSummary

CHARTS_HELP = "charts need matplotlib, which is not installed: pip install 'lrscale[charts]'"


class ChartsMissing(ImportError):
    """matplotlib is not installed; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure of the page."""

    svg: str
    """An inline <svg> element."""
    caption: str
    """Plain text."""


def accuracy_chart(arms: Sequence[ArmSummary]) -> Chart | None:
    """Accuracy against length, before → after; None where nothing was evaluated."""
    if not any(arm.before or arm.after for arm in arms):
        return None
    caption = (
        "Accuracy on held-out prompts against the mean length of a completion (discrete tokens plus latent steps). "
        "Hollow: before RL; filled: after; bars: 95 % intervals."
    )
    figure = figure_of(PAGE_INK, 8.0, 4.3)
    with style(PAGE_INK):
        panels.accuracy_against_length(figure.add_subplot(), arms, PAGE_INK)
        panels.shared_legend(figure, list({id(arm.run): arm.run for arm in arms}.values()), PAGE_INK)
    return chart_of(figure, "accuracy", caption)


def curves_chart(runs: Sequence[Run]) -> Chart | None:
    """Reward, accuracy and the parts of length over RL steps; None before the first step."""
    if not any(run.lines("rl") for run in runs):
        return None
    caption = (
        "RL steps. Faint: each step; strong: running mean over a twentieth of the steps; dots: evaluations on held-out "
        "prompts during the run."
    )
    if len(runs) > 1:
        caption += " Dashes tell the runs apart."
    figure = figure_of(PAGE_INK, 8.0, 5.2)
    with style(PAGE_INK):
        axes = figure.subplots(2, 2)
        for ax, (field, title) in zip(axes.flat, panels.CURVES, strict=True):
            panels.curve(ax, runs, field, title, PAGE_INK)
        panels.shared_legend(figure, runs, PAGE_INK)
    return chart_of(figure, "curves", caption)


def histogram_chart(run: Run, arms: Sequence[ArmSummary], name: str) -> Chart | None:
    """Markers a completion and N of each marker; None where no arm of the run writes markers."""
    writing = [
        arm for arm in arms if arm.run is run and any(item and item.steps_histogram for item in (arm.before, arm.after))
    ]
    if not writing:
        return None
    caption = "Markers in a completion (top) and the number N in each marker (bottom), held-out prompts. Outlined: before RL; filled: after."
    figure = figure_of(PAGE_INK, 8.0, 4.2)
    with style(PAGE_INK):
        axes = figure.subplots(2, max(len(writing), 2), squeeze=False)
        for column, arm in enumerate(writing):
            panels.histogram(axes[0][column], arm, "marker_histogram", PAGE_INK)
            panels.histogram(axes[1][column], arm, "steps_histogram", PAGE_INK)
        for unused in axes[:, len(writing) :].flat:
            unused.set_axis_off()
        axes[0][0].set_ylabel("share of completions")
        axes[1][0].set_ylabel("share of markers")
    return chart_of(figure, name, caption)


def projector_chart(run: Run, name: str) -> Chart | None:
    """Loss and latent scale during the first SFT, and held-out losses after each training of the projector."""
    if not run.lines("projector_sft") and not run.lines("heldout"):
        return None
    caption = (
        "Left: loss of the first projector SFT. Middle: rms(latent) / rms(embedding); near 1 the model reads latents at the "
        "scale it knows. Right: held-out loss after markers, after the SFT (0) and after each refresh; bars: standard errors."
    )
    figure = figure_of(PAGE_INK, 8.0, 2.9)
    with style(PAGE_INK):
        left, middle, right = figure.subplots(1, 3)
        panels.sft_curve(left, run, "loss", "SFT loss", PAGE_INK)
        panels.sft_curve(middle, run, "latent_scale", "Latent scale", PAGE_INK)
        panels.heldout(right, run, PAGE_INK)
    return chart_of(figure, name, caption)


def phases_chart(runs: Sequence[Run]) -> Chart | None:
    """Wall time by phase, one bar a stage and arm."""
    rows = sum(len(stage_times(run)) for run in runs)
    if not rows:
        return None
    figure = figure_of(PAGE_INK, 8.0, 0.9 + 0.32 * rows)
    with style(PAGE_INK):
        panels.phases(figure.add_subplot(), runs, PAGE_INK)
    return chart_of(figure, "phases", "Wall time by phase. Refreshes and evaluations are part of their arm.")


def write_overview(runs: Sequence[Run], arms: Sequence[ArmSummary], path: Path) -> bool:
    """The charts worth one glance as a PNG; False, and no file, where there is nothing to draw yet."""
    if not any(arm.before or arm.after or arm.rl_steps for arm in arms):
        return False
    figure = figure_of(PNG_INK, 11.0, 7.4)
    with style(PNG_INK):
        grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1), height_ratios=(1.25, 1))
        first = figure.add_subplot(grid[0, :2])
        panels.accuracy_against_length(first, arms, PNG_INK)
        first.set_title("Accuracy against length (hollow: before RL, filled: after, 95 % bars)")
        panels.heldout(figure.add_subplot(grid[0, 2]), runs[0], PNG_INK)
        for column, (field, title) in enumerate(panels.CURVES[1:]):
            panels.curve(figure.add_subplot(grid[1, column]), runs, field, title, PNG_INK)
        panels.shared_legend(figure, runs, PNG_INK, place="lower center")
    title = f"lrscale · {', '.join(run.label if run.finished else f'{run.label} (not finished)' for run in runs)}"
    save_png(figure, path, title)
    return True


def save_png(figure: Any, path: Path, title: str) -> None:
    """A drawn figure with its title as a file."""
    with style(PNG_INK):
        figure.suptitle(panels.literal(title), x=0.012, ha="left", fontsize=12, fontweight="bold")
        _draw(lambda: figure.savefig(path, format="png", dpi=150, metadata={"Software": None}))


def figure_of(ink: Ink, width: float, height: float) -> Any:
    """A figure of inches with constrained layout."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ChartsMissing(CHARTS_HELP) from error
    with style(ink):
        return Figure(figsize=(width, height), layout="constrained")


def style(ink: Ink) -> Any:
    """matplotlib's settings while something is drawn."""
    import matplotlib

    return matplotlib.rc_context(rc_params(ink))


def chart_of(figure: Any, name: str, caption: str) -> Chart:
    """A drawn figure as the page shows it; `name` is unique on the page."""
    import matplotlib

    text = io.StringIO()
    # A fixed salt and no date: the same metrics give the same page.
    with matplotlib.rc_context({**rc_params(PAGE_INK), "svg.hashsalt": "lrscale"}):
        _draw(lambda: figure.savefig(text, format="svg", metadata={"Date": None}))
    return Chart(themed(text.getvalue(), name=f"chart-{name}", label=html.escape(caption, quote=True)), caption)


def _draw(draw: Callable[[], None]) -> None:
    """matplotlib warns of fonts that are not on this machine; the page's reader brings their own."""
    import logging

    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    fonts.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            draw()
    finally:
        fonts.setLevel(level)
