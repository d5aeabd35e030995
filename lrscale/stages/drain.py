"""Asked to save and end: a file in the attempt's folder, seen by all ranks at the same step boundary.

Signals are no way to ask: the launcher ends the ranks when it gets one, SLURM sends it twice and too early, and each
rank would see it at another moment. So the main rank looks for a file, and says to all what it saw.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lrscale.parallel.lockstep import ALONE, Lockstep
from lrscale.stages.rollout_io import write_json

ASKED, SAVED = "drain", "checkpointed"


class Drained(Exception):
    """The run was asked to end and has saved all of its work; not a failure."""

    def __init__(self, stage: str, step: int) -> None:
        super().__init__(f"drained: saved after step {step} of {stage}")
        self.stage, self.step = stage, step


@dataclass(frozen=True, slots=True)
class Drain:
    """What stages ask at their step boundaries."""

    folder: Path | None = None
    """The attempt's; None never asks."""
    lockstep: Lockstep = ALONE

    def asked(self) -> bool:
        """Whether the run shall save and end here. Collective: the same answer on every rank."""
        if self.folder is None:
            return False
        return self.lockstep.any(flag=self.lockstep.ranks.is_main and (self.folder / ASKED).exists())

    def leave_if_asked(self, stage: str, step: int) -> None:
        """For places at which nothing is unsaved. Collective; raises Drained on every rank."""
        if self.asked():
            raise Drained(stage, step)

    def mark(self, drained: Drained) -> None:
        """The mark by which whoever asked knows that all is saved. Collective: no rank ends before it stands."""
        folder = self.folder
        assert folder is not None
        told = {"stage": drained.stage, "step": drained.step, "time": time.time()}
        self.lockstep.on_main(lambda: write_json(folder / SAVED, told))


NEVER = Drain()
