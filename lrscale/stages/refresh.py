"""The refresh: after each epoch of RL the projector is trained on the epoch's own right traces.

Done for the arms that decode with latents, `latent` and `shuffled_latent`, in both with real latents:
the shuffled arm is a control of what latents carry, so its projector has to be as well trained as the
other's. `zero_latent` and `discrete` never read a latent, so there is nothing to refresh.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lrscale.config.arms import Arm
from lrscale.parallel.lockstep import ALONE, Lockstep
from lrscale.records import RolloutGroup, Trace
from lrscale.stages.lite_rows import LiteRow, lite_rows
from lrscale.stages.parts import Parts
from lrscale.stages.projector_sft import Training, log_heldout, train_projector
from lrscale.stages.randomness import shuffled
from lrscale.stages.rollout_io import StateDamagedError, json_lines, read_json_lines, trace_from_json, trace_to_json
from lrscale.stages.sampling import ARMS
from lrscale.stages.traces import kept_traces


class RefreshBuffer:
    """The right traces of the current epoch, in a file of the run directory.

    A checkpoint records the file's size, as it does for metrics.jsonl: going on from it cuts the file back.
    The main rank has the file; `traces` hands its content to all.
    """

    def __init__(self, folder: Path, arm: Arm, epoch: int, size_bytes: int, *, lockstep: Lockstep = ALONE) -> None:
        self._path = folder / f"{arm}-refresh-{epoch + 1}.jsonl"
        self._size_bytes = size_bytes
        self._lockstep = lockstep
        lockstep.on_main(self._open)

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            if file.tell() < self._size_bytes:
                raise StateDamagedError(f"{self._path} lost lines since its checkpoint was written; restore it")
            file.truncate(self._size_bytes)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def add(self, groups_P: Sequence[RolloutGroup]) -> None:
        """Keep the samples with a positive reward; on the disk before a checkpoint counts on them."""
        content = json_lines(map(trace_to_json, kept_traces(groups_P)))
        self._lockstep.on_main(lambda: self._append(content))
        self._size_bytes += len(content)

    def _append(self, content: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def traces(self) -> list[Trace]:
        return [trace_from_json(entry) for entry in self._lockstep.on_main(lambda: read_json_lines(self._path))]


def refreshes(parts: Parts, arm: Arm) -> bool:
    """Whether the projector is refreshed in this arm."""
    return ARMS[arm].uses_projector and parts.recipe.stages.rl.refresh.share > 0


def steps_per_epoch(parts: Parts) -> int:
    """RL steps between two refreshes."""
    config = parts.recipe.stages.rl
    prompts = len(parts.book.prompts("train", markers=True))
    return config.refresh.every_steps or -(-prompts // config.prompts_per_step)


def refresh_projector(
    parts: Parts, arm: Arm, traces: Sequence[Trace], heldout: Sequence[LiteRow], *, number: int, step: int
) -> None:
    """Stage 2 again, one pass over the share of the traces that the recipe takes, both ratios."""
    recipe = parts.recipe
    config = recipe.stages.rl.refresh
    chosen = shuffled(traces, recipe.seed, "refresh", number)[: max(1, round(config.share * len(traces)))]
    rows = lite_rows(chosen, parts.policy.detector, recipe.stages.traces, recipe.seed, "refresh lite", number)
    if not rows:
        parts.log.say(f"refresh {number}: no right trace with a sentence to replace in this epoch; projector unchanged")
        return
    training = Training(config.learning_rate, epochs=1, arm=arm, refresh=number, step=step)
    train_projector(parts, rows, training)
    log_heldout(parts, heldout, training, step)
