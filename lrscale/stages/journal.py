"""Where a run stands: checkpoints of its stages, marks of those that are over, and how to go on.

    checkpoints/
      traces/done.json                              {"metrics_bytes": ...}: the stage is over
      projector_sft/step-N/  ...  done.json         the last one is where every arm starts
      latent/step-N/  ...  done.json
      discrete/step-N/

A checkpoint records the size of metrics.jsonl at its moment. Going on from it cuts the file back to
that size, so whatever was written since is written again, and is the same: every step is a function
of the checkpoint and the step's number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrscale.config.parallel import CheckpointsConfig
from lrscale.parallel.checkpoint import CheckpointError, CheckpointStore
from lrscale.parallel.engine import Engine
from lrscale.report.metrics import MetricsLog
from lrscale.stages.rollout_io import StateDamagedError, read_json, write_json

_KEPT = CheckpointsConfig()


class Journal:
    """Saves and restores; stages are asked for in the order in which they run."""

    def __init__(
        self, folder: Path, engine: Engine, metrics: MetricsLog | None, kept: CheckpointsConfig = _KEPT
    ) -> None:
        """`metrics` is the main rank's; the others have none."""
        self.folder = folder
        self._engine = engine
        self._metrics = metrics
        self._kept = kept
        self._on_main = engine.lockstep.on_main
        self._bytes_before = 0
        """Size of metrics.jsonl when the last finished stage ended."""

    def is_done(self, stage: str) -> bool:
        size = self._on_main(lambda: _marked_size(self._mark(stage)))
        if size is None:
            return False
        self._bytes_before = size
        return True

    def finish(self, stage: str) -> None:
        """The stage is over: a later launch begins with the next one. Only its newest checkpoint stays."""
        self._bytes_before = self._metrics_bytes()
        self._on_main(lambda: write_json(self._mark(stage), {"metrics_bytes": self._bytes_before}))
        self._store(stage, keep_last=1).prune()

    def resume(self, stage: str) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint of the stage and its state; None, metrics cut back, without one.

        Raises:
            StateDamagedError: metrics.jsonl has lost lines since.
        """
        store = self._store(stage)
        checkpoint = store.latest()
        if checkpoint is None:
            self._cut_metrics(self._bytes_before)
            return None
        state = store.load(checkpoint, self._engine)
        self._cut_metrics(state["metrics_bytes"])
        return state

    def save(self, stage: str, step: int, state: dict[str, Any], *, score: float | None = None) -> None:
        """A checkpoint after `step` steps of the stage. Raises CheckpointError when the disk refuses."""
        whole = {**state, "stage": stage, "step": step, "metrics_bytes": self._metrics_bytes()}
        self._store(stage).save(f"step-{step}", self._engine, whole, score=score)

    def load_end_of(self, stage: str) -> None:
        """Put the engine where the stage ended.

        Raises:
            CheckpointError: that checkpoint is gone or damaged.
        """
        store = self._store(stage)
        checkpoint = store.latest()
        state = store.load(checkpoint, self._engine) if checkpoint is not None else {}
        if not state.get("final"):
            raise CheckpointError(
                f"the last checkpoint of {stage} in {store.folder} is gone or damaged, and every arm starts from it. "
                "Restore it, or start a new run"
            )

    def _cut_metrics(self, size_bytes: int) -> None:
        def cut() -> None:
            assert self._metrics is not None
            try:
                self._metrics.truncate(size_bytes)
            except ValueError as error:
                raise StateDamagedError(str(error)) from error

        self._on_main(cut)

    def _metrics_bytes(self) -> int:
        return self._on_main(lambda: self._metrics.size_bytes if self._metrics is not None else 0)

    def _store(self, stage: str, keep_last: int | None = None) -> CheckpointStore:
        return CheckpointStore(
            self.folder / stage,
            keep_last or self._kept.keep_last,
            self._kept.keep_best,
            lockstep=self._engine.lockstep,
        )

    def _mark(self, stage: str) -> Path:
        return self.folder / stage / "done.json"


def _marked_size(mark: Path) -> int | None:
    """Size of metrics.jsonl when the stage of this mark ended; None where it has not."""
    if not mark.is_file():
        return None
    content = read_json(mark)
    size = content.get("metrics_bytes") if isinstance(content, dict) else None
    if not isinstance(size, int):
        raise StateDamagedError(f"{mark} is damaged: it tells no metrics_bytes; restore it, or start a new run")
    return size
