"""What became of every sequence, and of every second: nothing may be lost or counted twice, failures or not."""

from __future__ import annotations

from dataclasses import dataclass, field

PHASES = (
    "start",
    "rollout",
    "score",
    "logprobs",
    "update",
    "refresh",
    "publish",
    "checkpoint",
    "lost",
    "detect",
    "queue",
)
"""Of the wall time, as the trainer sees it. `rollout`: it waits for engines; `score`: for scores after the last of
them; `lost`: done since the last checkpoint, and done again."""


@dataclass(slots=True)
class Sequences:
    """How often each sequence of a step was generated, scored and trained on."""

    generated: bytearray
    scored: bytearray
    trained: bytearray

    @classmethod
    def of(cls, count: int) -> Sequences:
        return cls(bytearray(count), bytearray(count), bytearray(count))

    @property
    def whole(self) -> bool:
        """Each exactly once in all three."""
        once = b"\x01" * len(self.generated)
        return self.generated == once and self.scored == once and self.trained == once


@dataclass(slots=True)
class Ledger:
    """The run's account, written during attempts and set back to the last checkpoint after a failure."""

    steps: dict[int, Sequences] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    busy: dict[str, float] = field(default_factory=lambda: {"generate": 0.0, "score": 0.0, "train": 0.0})
    """Seconds of work a role, added up over engines and workers; work that was lost included."""
    step_ends: dict[int, float] = field(default_factory=dict)
    lost_sequences: int = 0
    _saved: dict[str, float] = field(default_factory=dict)

    def open_step(self, step: int, count: int) -> Sequences:
        self.steps[step] = Sequences.of(count)
        return self.steps[step]

    def spend(self, phase: str, seconds: float) -> None:
        self.phases[phase] += seconds

    def save(self) -> None:
        """A checkpoint is whole: what was spent so far is safe."""
        self._saved = dict(self.phases)

    def fall_back(self, step: int, lost_s: float) -> None:
        """Go back to the checkpoint of `step`; `lost_s` seconds of work were in vain."""
        kept = self._saved or dict.fromkeys(PHASES, 0.0)
        self.phases = {**kept, "lost": kept["lost"] + lost_s}
        for later in [number for number in self.steps if number > step]:
            self.lost_sequences += sum(self.steps.pop(later).generated)
            self.step_ends.pop(later, None)
        self.save()
