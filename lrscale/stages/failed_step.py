"""The batch of an update that met something not finite, kept with the weights it met it with.

failed/latent-step-12/
  batch.json  samples.safetensors        the rows (RL), or batch.json alone (projector training)
  weights/                               a checkpoint as those of a run: `lrscale replay-step` loads it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrscale.config.arms import Arm
from lrscale.parallel.checkpoint import CheckpointError, CheckpointStore
from lrscale.parallel.engine import Engine, NonFiniteError
from lrscale.parallel.lockstep import PeerError
from lrscale.records import LatentSpan, Score
from lrscale.stages.exchange import Sample, from_bytes, to_bytes
from lrscale.stages.lite_rows import LiteRow
from lrscale.stages.parts import Parts
from lrscale.stages.rollout_io import read_json, write_json, write_whole
from lrscale.stages.update import Row

FOLDER = "failed"
_WEIGHTS = "weights"
_SAMPLES = "samples.safetensors"


@dataclass(frozen=True, slots=True)
class FailedStep:
    """What `save_failed_step` kept."""

    stage: Literal["rl", "projector_sft"]
    arm: Arm | None
    step: int
    rows: list[Row] | list[LiteRow]
    weights: Path
    """A checkpoint folder."""


def save_failed_step(
    engine: Engine, run_dir: Path, rows: Sequence[Row] | Sequence[LiteRow], *, arm: Arm | None, step: int
) -> Path:
    """Keep the rows of the update and the weights it began with. Collective."""
    folder = run_dir / FOLDER / f"{arm or 'projector_sft'}-step-{step}"
    engine.lockstep.on_main(lambda: _write_rows(folder, rows, arm, step))
    CheckpointStore(folder / _WEIGHTS, lockstep=engine.lockstep).save("before", engine, {"step": step})
    return folder


def keep_failed(
    parts: Parts, rows: Sequence[Row] | Sequence[LiteRow], error: NonFiniteError, *, arm: Arm | None, step: int
) -> NonFiniteError:
    """The same error, saying what was kept. A disk that refuses must not hide it."""
    try:
        folder = save_failed_step(parts.engine, parts.run_dir, rows, arm=arm, step=step)
    except (CheckpointError, PeerError, OSError) as refused:
        return NonFiniteError(f"{error} (its batch could not be kept: {refused})")
    return NonFiniteError(f"{error}. Its batch and weights are in {folder}: lrscale replay-step {parts.run_dir}")


def load_failed_step(folder: Path) -> FailedStep:
    """Raises FileNotFoundError where the folder holds no failed step, CheckpointError where its weights are damaged."""
    about = read_json(folder / "batch.json")
    rows: Any
    if about["stage"] == "rl":
        samples = from_bytes((folder / _SAMPLES).read_bytes())
        rows = [
            Row(entry["name"], samples[index].rollout, entry["advantage"]) for index, entry in enumerate(about["rows"])
        ]
    else:
        rows = [
            LiteRow(
                entry["prompt_id"],
                tuple(entry["ids"]),
                tuple(LatentSpan(*span) for span in entry["spans"]),
                tuple(() for _ in entry["spans"]),
            )
            for entry in about["rows"]
        ]
    checkpoint = CheckpointStore(folder / _WEIGHTS).latest()
    if checkpoint is None:
        raise ValueError(f"{folder / _WEIGHTS} holds no whole checkpoint: the weights of that step are lost")
    return FailedStep(about["stage"], about["arm"], about["step"], rows, checkpoint.folder)


def _write_rows(folder: Path, rows: Sequence[Row] | Sequence[LiteRow], arm: Arm | None, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    of_rl = [row for row in rows if isinstance(row, Row)]
    about: dict[str, Any] = {"stage": "rl" if of_rl else "projector_sft", "arm": arm, "step": step}
    if of_rl:
        samples = {index: Sample(row.rollout, Score(0.0)) for index, row in enumerate(of_rl)}
        write_whole(folder / _SAMPLES, to_bytes(samples))
        about["rows"] = [{"name": row.name, "advantage": row.advantage} for row in of_rl]
    else:
        about["rows"] = [
            {"prompt_id": row.prompt_id, "ids": row.ids, "spans": row.spans} for row in rows if isinstance(row, LiteRow)
        ]
    write_json(folder / "batch.json", json.loads(json.dumps(about)))
