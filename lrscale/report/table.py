"""The closing table: the same cells in a terminal, in a log and in report.html."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrscale.report.phases import stage_times
from lrscale.report.runs import Run, arm_title, load_runs
from lrscale.report.summary import (
    NO_ERROR,
    ArmSummary,
    Evaluation,
    GainKept,
    compared_on,
    gain_sentence,
    gains_kept,
    heldout_losses,
    heldout_sentence,
    summarise,
    together,
)
from lrscale.report.timing import duration

MISSING = "–"  # noqa: RUF001 - an en dash is what stands for "none" in tables


@dataclass(frozen=True, slots=True)
class Cells:
    """A table as text: all rows as long as the header; the first `text_columns` columns are words."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1


def summary_cells(arms: Sequence[ArmSummary]) -> Cells:
    """Arm, accuracy before and after, tokens, latent steps, RL tokens, minutes; the run where there are several."""
    several = len({id(arm.run) for arm in arms}) > 1
    header = ("arm", "accuracy before, %", "accuracy after, %", "tokens", "latent steps", "RL tokens", "minutes")
    rows = []
    for arm in arms:
        row = (
            arm_title(arm.arm),
            _accuracy(arm.before),
            _accuracy(arm.after) if arm.after else f"step {arm.rl_steps}" if arm.rl_steps else MISSING,
            _change(arm, "tokens_mean"),
            _change(arm, "latent_steps_mean"),
            count(arm.train_tokens),
            MISSING if arm.minutes is None else f"{arm.minutes:.1f}",
        )
        rows.append((arm.run.label, *row) if several else row)
    return Cells(("run", *header) if several else header, tuple(rows), 2 if several else 1)


def heldout_cells(run: Run, *, newest_only: bool = False) -> Cells:
    """Held-out losses real, zero and shuffled, with the paired differences and their standard errors.

    `newest_only` keeps the first SFT and the last refresh of each arm.
    """
    items = heldout_losses(run)
    if newest_only:
        items = list({item.arm: item for item in items}.values())
    header = ("projector", "rows", "prompts", "real", "zero", "shuffled", "real − zero", "real − shuffled")  # noqa: RUF001
    rows = tuple(
        (
            "projector SFT" if item.arm is None else f"{arm_title(item.arm)}, refresh {item.refresh}",
            count(item.rows),
            count(item.prompts),
            _with_error(item.loss_real, item.loss_real_se),
            _with_error(item.loss_zero, None),
            _with_error(item.loss_shuffled, None),
            _difference(item.real_minus_zero, item.real_minus_zero_se),
            _difference(item.real_minus_shuffled, item.real_minus_shuffled_se),
        )
        for item in items
    )
    return Cells(header, rows)


def print_summary(run_dirs: Iterable[Path | str], console: Console | None = None) -> None:
    """Print the closing table and what may be said about it, to stderr; plain aligned text off a terminal.

    Raises RunNotFound.
    """
    console = console or Console(stderr=True, highlight=False)
    runs = load_runs(run_dirs)
    arms = summarise(runs)
    if not any(arm.before or arm.after or arm.rl_steps for arm in arms):
        _say(console, "Nothing to sum up yet: no arm has started.")
        return
    title = ", ".join(run.label if run.finished else f"{run.label} (not finished)" for run in runs)
    _print_cells(console, summary_cells(arms), title)
    _say(console, "Brackets: 95 % intervals. Tokens and latent steps: means a completion, before → after RL.")
    kept = gains_kept(arms)
    across = across_runs_cells(arms, kept)
    if across:
        _print_cells(console, across, "Over the runs: mean (least to most)")
    for items in together(kept):
        _say(console, said(items, runs))
    for run in runs:
        minutes = shared_minutes(run)
        if minutes:
            _say(console, minutes)
        losses = heldout_losses(run)
        if losses:
            _print_cells(console, heldout_cells(run, newest_only=True), f"Held-out loss after markers, {run.label}")
            _say(console, heldout_sentence(losses[0]))


def across_runs_cells(arms: Sequence[ArmSummary], kept: Sequence[GainKept]) -> Cells | None:
    """Arms that several runs have, each figure as mean and range over the runs; None where runs are not comparable."""
    runs = list({id(arm.run): arm.run for arm in arms}.values())
    if len(runs) < 2 or any(compared_on(run) != compared_on(runs[0]) for run in runs):
        return None
    header = (
        "arm",
        "runs",
        "accuracy before, %",
        "accuracy after, %",
        "tokens after",
        "latent steps after",
        "RL tokens",
        "minutes",
        "gain kept, %",
    )
    rows = []
    for name in dict.fromkeys(arm.arm for arm in arms):
        pairs = [(arm.before, arm.after) for arm in arms if arm.arm == name and arm.before and arm.after]
        shares = [item.share for item in kept if item.arm.arm == name]
        if len(pairs) < 2:
            continue
        own = [arm for arm in arms if arm.arm == name]
        tokens = [arm.train_tokens / 1000 for arm in own if arm.train_tokens]
        minutes = [arm.minutes for arm in own if arm.minutes is not None]
        known = [100 * share for share in shares if share is not None]
        left_out = len(shares) - len(known)
        gain = mean_and_range(known) + (f", {left_out} not defined" if left_out and known else "")
        rows.append(
            (
                arm_title(name),
                str(len(pairs)),
                mean_and_range([100 * before.accuracy for before, _ in pairs]),
                mean_and_range([100 * after.accuracy for _, after in pairs]),
                mean_and_range([after.tokens_mean for _, after in pairs]),
                mean_and_range([after.latent_steps_mean for _, after in pairs]),
                mean_and_range(tokens) + " k" if tokens else MISSING,
                mean_and_range(minutes) if minutes else MISSING,
                gain if known or not shares else "not defined",
            )
        )
    return Cells(header, tuple(rows)) if rows else None


def mean_and_range(values: Sequence[float]) -> str:
    """`80.3 (79.9 to 80.7)`; a dash for none."""
    if not values:
        return MISSING
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def said(kept: Sequence[GainKept], runs: Sequence[Run]) -> str:
    """The sentence on the gain kept by arms that are told of together, with the run's name where there are several."""
    return gain_sentence(*kept) if len(runs) == 1 else f"{kept[0].arm.run.label}: {gain_sentence(*kept)}"


def shared_minutes(run: Run) -> str:
    """What the stages before the arms took, which no arm's minutes include; empty where nothing is recorded."""
    names = {arm_title(arm) for arm in run.arms}
    before = [time for time in stage_times(run) if time.name not in names]
    if not before:
        return ""
    return (
        f"{run.label}, shared by its arms: "
        + ", ".join(f"{time.name} {duration(time.total_s)}" for time in before)
        + "."
    )


def plain_table(cells: Cells) -> str:
    """Columns aligned with spaces, two between them."""
    lines = [cells.header, *cells.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(cells.header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < cells.text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def count(number: float | None) -> str:
    """A count with thin thousands: 1,234,567; a dash for none."""
    return MISSING if number is None else f"{number:,.0f}"


def _print_cells(console: Console, cells: Cells, title: str) -> None:
    if not console.is_terminal or console.width < 100:
        _say(console, f"\n{title}\n{plain_table(cells)}")
        return
    table = Table(title=Text(title), title_justify="left", title_style="bold", header_style="bold")
    for column, name in enumerate(cells.header):
        words = column < cells.text_columns
        table.add_column(name, justify="left" if words else "right", no_wrap=True, style="cyan" if words else "")
    for row in cells.rows:
        table.add_row(*map(Text, row))
    console.print()
    console.print(table)


def _say(console: Console, text: str) -> None:
    # Off a terminal nothing is wrapped: a log keeps one sentence on one line.
    console.print(Text(text), soft_wrap=not console.is_terminal or "\n" in text, highlight=False)


def _accuracy(item: Evaluation | None) -> str:
    if item is None:
        return MISSING
    return f"{100 * item.accuracy:.1f} [{100 * item.low:.1f}, {100 * item.high:.1f}]"


def _change(arm: ArmSummary, field: str) -> str:
    values = [MISSING if item is None else f"{getattr(item, field):.1f}" for item in (arm.before, arm.after)]
    return MISSING if values == [MISSING, MISSING] else " → ".join(values)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _difference(value: float | None, error: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:+.4f}, {NO_ERROR}" if error is None else f"{value:+.4f} ± {error:.4f}"
