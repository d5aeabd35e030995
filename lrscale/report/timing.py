"""Where the time goes: seconds a phase, progress bars, one printed line a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class PhaseTimer:
    """Wall and CPU seconds a phase, between two calls of `take`.

    A phase inside a phase is counted once, in the inner one, so phases add up to at most `step_s`.
    """

    def __init__(self, *phases: str, synchronise: Callable[[], None] | None = None) -> None:
        """`phases` are reported even when they did not run (0 s).

        `synchronise` is called at both ends of a phase, e.g. torch.cuda.synchronize.
        """
        self._names = phases
        self._synchronise = synchronise
        self._open: list[str] = []
        self._restart()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds under `name`; several blocks of one name add up."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds since the last call: NAME_s and NAME_cpu_s a phase, then step_s and cpu_s for everything."""
        self._charge()
        seconds: dict[str, float] = {}
        for name in dict.fromkeys((*self._names, *self._wall_s)):
            seconds[f"{name}_s"] = round(self._wall_s.get(name, 0.0), 6)
            seconds[f"{name}_cpu_s"] = round(self._cpu_s.get(name, 0.0), 6)
        seconds["step_s"] = round(self._last_wall - self._start_wall, 6)
        seconds["cpu_s"] = round(self._last_cpu - self._start_cpu, 6)
        self._restart()
        return seconds

    def _restart(self) -> None:
        self._wall_s: dict[str, float] = {}
        self._cpu_s: dict[str, float] = {}
        self._start_wall = self._last_wall = time.perf_counter()
        self._start_cpu = self._last_cpu = time.process_time()

    def _charge(self) -> None:
        """Give the time since the last change of phase to the innermost open phase."""
        if self._synchronise is not None:
            self._synchronise()
        wall, cpu = time.perf_counter(), time.process_time()
        if self._open:
            name = self._open[-1]
            self._wall_s[name] = self._wall_s.get(name, 0.0) + wall - self._last_wall
            self._cpu_s[name] = self._cpu_s.get(name, 0.0) + cpu - self._last_cpu
        self._last_wall, self._last_cpu = wall, cpu


class StageProgress:
    """Progress of one stage on stderr: a bar on a terminal, elsewhere a plain line now and then.

        with StageProgress("rl latent", total=160, unit="steps") as progress:
            for step in ...:
                with progress.inner("rollout", total=768) as samples:
                    for rollout in ...:
                        samples.advance()
                progress.line(step_line(metrics, total=160))
                progress.advance()

    NO_COLOR is honoured by rich. Ranks other than 0 pass enabled=False.
    """

    plain_every_s: float = 15.0
    """Off a terminal, the least time between two lines of the same stage."""

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        unit: str = "steps",
        done: int = 0,
        console: Console | None = None,
        enabled: bool = True,
    ) -> None:
        """`done`: what an earlier attempt has finished; it fills the bar but not the rate."""
        self._label, self._total, self._unit = label, total, unit
        self._done_before = self._done = done
        self._console = console or Console(stderr=True, highlight=False)
        self._enabled = enabled
        self._bars = enabled and self._console.is_terminal and not self._console.is_dumb_terminal
        self._parent: StageProgress | None = None
        self._progress: Progress | None = None
        self._note = ""

    def __enter__(self) -> StageProgress:
        self._started = self._printed = time.monotonic()
        if self._bars:
            self._open_bar()
        elif self._enabled and self._parent is None:
            self._print_plain()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is None:
            if self._enabled and self._parent is None:
                self._print_plain(ended=kind is None)
        elif self._parent is not None:
            self._progress.remove_task(self._task)
        else:
            self._progress.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` (short, e.g. "accuracy 0.41") stays beside the bar until the next one."""
        self._done += count
        self._note = note or self._note
        if self._progress is not None:
            self._progress.update(self._task, advance=count, note=self._note)
        elif self._enabled and time.monotonic() - self._printed >= self.plain_every_s:
            self._print_plain()

    def line(self, text: str) -> None:
        """Print one line above the bar. The text is literal: no markup, no wrapping."""
        if not self._enabled:
            return
        self._printed = time.monotonic()
        console = self._progress.console if self._progress is not None else self._console
        console.print(Text(text), soft_wrap=True, highlight=False)

    def inner(self, label: str, total: int | None = None, *, unit: str = "samples") -> StageProgress:
        """A second bar below this one, gone when its block ends; off a terminal it speaks only when it is slow."""
        child = StageProgress(label, total, unit=unit, console=self._console, enabled=self._enabled)
        child._parent = self
        child.plain_every_s = self.plain_every_s
        child._progress = self._progress
        return child

    def _open_bar(self) -> None:
        # A resumed stage starts at `done`; rich takes the rate from advances only, so it stays true.
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                _RateColumn(),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                TextColumn("[dim]{task.fields[note]}", markup=True),
                console=self._console,
            )
            self._progress.start()
        label = self._label if self._parent is None else f"  {self._label}"
        self._task = self._progress.add_task(label, total=self._total, completed=self._done, note="", unit=self._unit)

    def _print_plain(self, *, ended: bool = False) -> None:
        elapsed_s = time.monotonic() - self._started
        of_total = f"/{self._total}" if self._total is not None else ""
        words = [f"{self._label}: {self._done}{of_total} {self._unit}"]
        fresh = self._done - self._done_before
        if fresh and elapsed_s > 0:
            words.append(f"{fresh / elapsed_s:.3g}/s")
            if ended:
                words.append(f"done in {duration(elapsed_s)}")
            elif self._total is not None and self._total > self._done:
                words.append(f"{duration((self._total - self._done) * elapsed_s / fresh)} left")
        if self._note:
            words.append(self._note)
        self._printed = time.monotonic()
        self._console.print(Text(", ".join(words)), soft_wrap=True, highlight=False)


class _RateColumn(ProgressColumn):
    """How many a second, or how many seconds each where that reads better."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("", style="dim")
        unit = task.fields.get("unit", "")
        return Text(f"{speed:.3g} {unit}/s" if speed >= 1 else f"{1 / speed:.3g} s each", style="dim")


def duration(seconds: float) -> str:
    """Seconds for people: `8.4 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def step_line(metrics: Mapping[str, Any], total: int | None = None) -> str:
    """One line a training step: what was earned, how long it was, where the seconds went."""
    where = metrics.get("arm") or metrics.get("stage", "")
    of_total = f"/{total}" if total is not None else ""
    width = len(str(total)) if total is not None else 1
    words = [f"{where} {metrics['step']:>{width}}{of_total}"]
    for label, key, form in _STEP_FIELDS:
        value = metrics.get(key)
        if value is not None and (value or key != "scores_failed"):
            words.append(f"{label} {value:{form}}")
    seconds = [
        f"{key.removesuffix('_s')} {took:.2f} s"
        for key, took in metrics.items()
        if key.endswith("_s") and not key.endswith("_cpu_s") and key not in ("step_s", "cpu_s") and took >= 0.005
    ]
    return "  ".join(words) + (f"  | {', '.join(seconds)}" if seconds else "")


_STEP_FIELDS = (
    ("reward", "reward_mean", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("tokens", "tokens_mean", ".1f"),
    ("latent steps", "latent_steps_mean", ".2f"),
    ("loss", "loss", ".4f"),
    ("grad", "grad_norm", ".3g"),
    ("failed scores", "scores_failed", "d"),
)
