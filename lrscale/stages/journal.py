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

from lrscale.parallel.checkpoint import CheckpointError, CheckpointStore
from lrscale.parallel.engine import Engine
from lrscale.report.metrics import MetricsLog
from lrscale.stages.rollout_io import StateDamagedError, read_json, write_json


class Journal:
    """Saves and restores; stages are asked for in the order in which they run."""

    def __init__(self, folder: Path, engine: Engine, metrics: MetricsLog) -> None:
        self.folder = folder
        self._engine = engine
        self._metrics = metrics
        self._bytes_before = 0
        """Size of metrics.jsonl when the last finished stage ended."""

    def is_done(self, stage: str) -> bool:
        mark = self._mark(stage)
        if not mark.is_file():
            return False
        content = read_json(mark)
        size = content.get("metrics_bytes") if isinstance(content, dict) else None
        if not isinstance(size, int):
            raise StateDamagedError(f"{mark} is damaged: it tells no metrics_bytes; restore it, or start a new run")
        self._bytes_before = size
        return True

    def finish(self, stage: str) -> None:
        """The stage is over: a later launch begins with the next one. Only its newest checkpoint stays."""
        self._bytes_before = self._metrics.size_bytes
        write_json(self._mark(stage), {"metrics_bytes": self._bytes_before})
        CheckpointStore(self.folder / stage, keep_last=1).prune()

    def resume(self, stage: str) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint of the stage and its state; None, metrics cut back, without one.

        Raises:
            StateDamagedError: metrics.jsonl has lost lines since.
        """
        store = CheckpointStore(self.folder / stage)
        checkpoint = store.latest()
        if checkpoint is None:
            self._cut_metrics(self._bytes_before)
            return None
        state = store.load(checkpoint, self._engine)
        self._cut_metrics(state["metrics_bytes"])
        return state

    def save(self, stage: str, step: int, state: dict[str, Any]) -> None:
        """A checkpoint after `step` steps of the stage. Raises CheckpointError when the disk refuses."""
        whole = {**state, "stage": stage, "step": step, "metrics_bytes": self._metrics.size_bytes}
        CheckpointStore(self.folder / stage).save(f"step-{step}", self._engine, whole)

    def load_end_of(self, stage: str) -> None:
        """Put the engine where the stage ended.

        Raises:
            CheckpointError: that checkpoint is gone or damaged.
        """
        store = CheckpointStore(self.folder / stage)
        checkpoint = store.latest()
        state = store.load(checkpoint, self._engine) if checkpoint is not None else {}
        if not state.get("final"):
            raise CheckpointError(
                f"the last checkpoint of {stage} in {store.folder} is gone or damaged, and every arm starts from it. "
                "Restore it, or start a new run"
            )

    def _cut_metrics(self, size_bytes: int) -> None:
        try:
            self._metrics.truncate(size_bytes)
        except ValueError as error:
            raise StateDamagedError(str(error)) from error

    def _mark(self, stage: str) -> Path:
        return self.folder / stage / "done.json"
