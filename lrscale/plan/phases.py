"""What is in memory in every phase of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """What is in memory at the height of one phase."""

    name: str
    parts: tuple[tuple[str, float], ...]
    """GiB a GPU, by what they are for."""
    host: float
    """GiB a node."""
    gpus: str = "train"
    """`train` or `rollout`: where nodes are split, whose GPUs."""

    @property
    def total(self) -> float:
        return sum(size for _, size in self.parts)

    def part(self, name: str) -> float:
        """GiB of one part, 0 where the phase has none of it."""
        return dict(self.parts).get(name, 0.0)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All phases of a run, in the order of time."""

    phases: tuple[Phase, ...]
    states: float
    """GiB a GPU of weights, gradients, masters and moments that a training rank keeps."""
    kept_for_backward: float
    """GiB a GPU of an update's activations."""

    @property
    def host_largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.host)

    @property
    def host_per_node(self) -> float:
        """GiB a node at most: while loading, saving, or for what is offloaded."""
        return self.host_largest.host

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> float:
        """GiB a GPU."""
        return self.largest.total

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)
