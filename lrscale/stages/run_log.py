"""What a run tells: metrics for machines, one line a step for people, both kept with the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from lrscale.report.metrics import MetricsLog
from lrscale.report.timing import StageProgress

logger = logging.getLogger("lrscale")
"""The worker gives it a file in the attempt's folder; warnings also reach the terminal."""


class Trackers(Protocol):
    """TensorBoard, Weights & Biases and the like; see lrscale.parallel.trackers."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class Display:
    """The progress display; whatever it shows also goes to the log file."""

    def __init__(self, *, show: bool = True) -> None:
        """`show`: on stderr."""
        self._show = show
        self._progress: StageProgress | None = None

    def say(self, text: str) -> None:
        """One line for people: above the progress bar, and into the log file."""
        logger.info(text)
        if self._progress is not None:
            self._progress.line(text)
        elif self._show:
            StageProgress("").line(text)

    @contextmanager
    def progress(self, label: str, total: int | None, *, unit: str = "steps", done: int = 0) -> Iterator[StageProgress]:
        """The bar of a stage; inside another one it becomes that one's inner bar."""
        outer = self._progress
        if outer is not None:
            with outer.inner(label, total, unit=unit) as inner:
                yield inner
            return
        logger.info("%s: %d of %s %s done", label, done, total, unit)
        with StageProgress(label, total, unit=unit, done=done, enabled=self._show) as progress:
            self._progress = progress
            try:
                yield progress
            finally:
                self._progress = None


class RunLog(Display):
    """The one place that writes metrics.jsonl, with the run's display."""

    def __init__(self, metrics: MetricsLog | None, trackers: Trackers | None = None, *, show: bool = True) -> None:
        """`metrics` is None on ranks other than the main one, which leave the writing to it."""
        super().__init__(show=show)
        self.metrics = metrics
        self._trackers = trackers

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl and hand its numbers to the trackers."""
        if self.metrics is not None:
            self.metrics.append(metrics)
        if self._trackers is not None:
            self._trackers.log(metrics, step=metrics["step"])

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
        if self._trackers is not None:
            self._trackers.close()
