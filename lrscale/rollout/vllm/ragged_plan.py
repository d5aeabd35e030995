"""The order of work of a step in which sequences compute several positions each, planned on the host.

Such steps are prefills, which are few; their plan may look at values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lrscale.rollout.vllm.position_automaton import PositionAutomaton, steps_to_come
from lrscale.rollout.vllm.side_buffers import SideBuffers
from lrscale.rollout.vllm.step import Step


@dataclass(slots=True)
class RaggedPlan:
    """Rows by what has to be done with them."""

    known_rows: list[int] = field(default_factory=list)
    """Latent rows whose latent lies in the side buffers ..."""
    known_blocks: list[int] = field(default_factory=list)
    """... under these blocks."""
    rounds: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """Round from 1 on -> (latent row, row of the position before it), where both are computed now."""
    inner_rows: list[int] = field(default_factory=list)
    """Latent rows with the position before them in the row before."""
    last_rows: list[int] = field(default_factory=list)
    """Rows that side buffers are written from: the last of each sequence and of each block ..."""
    last_blocks: list[int] = field(default_factory=list)
    last_states: list[int] = field(default_factory=list)
    forced_rows: list[int] = field(default_factory=list)
    """Rows that a latent position follows."""
    shared: int = 0
    """Sequences that go on from a block which another one fills in this step."""

    @classmethod
    def make(cls, step: Step, buffers: SideBuffers, automaton: PositionAutomaton) -> RaggedPlan:
        """Raises RuntimeError where vLLM's block table is not laid out as it is read here."""
        return _Planner(step, buffers, automaton).plan()

    def known(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _indices(self.known_rows, device), _indices(self.known_blocks, device)

    def passes(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for number in sorted(self.rounds):
            rows, previous = zip(*self.rounds[number], strict=True)
            yield _indices(rows, device), _indices(previous, device)

    def inner(self, device: torch.device) -> Tensor:
        return _indices(self.inner_rows, device)

    def lasting(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        columns = (self.last_rows, self.last_blocks, self.last_states)
        rows, blocks, states = (_indices(column, device) for column in columns)
        return rows, blocks, states

    def forced(self, device: torch.device) -> Tensor:
        return _indices(self.forced_rows, device)


def _indices(values: object, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


class _Planner:
    """Walks over the sequences, each behind the one whose block it goes on from."""

    def __init__(self, step: Step, buffers: SideBuffers, automaton: PositionAutomaton) -> None:
        self.automaton = automaton
        size = buffers.block_size
        starts = step.starts_R1.tolist()
        # Sequences without a position in this step do not exist; padding repeats the last start.
        self.bounds = [(first, end) for first, end in pairwise(starts) if end > first]
        firsts_R = step.starts_R1[: len(self.bounds)]
        positions_R = step.positions_T[firsts_R]
        before_R = step.blocks_before(positions_R, size)
        self.first_positions: list[int] = positions_R.tolist()
        self.before: list[int] = before_R.tolist()
        self.before_states: list[int] = buffers.state[before_R].tolist()
        self.ids_T, self.positions_T, slots_T = (
            column.cpu().numpy() for column in (step.ids_T, step.positions_T, step.slots_T)
        )
        self.blocks_T = slots_T // size
        self._check_layout(step, slots_T, size)
        self.completes_T = (self.positions_T + 1) % size == 0
        completing = np.flatnonzero(self.completes_T).tolist()
        row_completing = {int(self.blocks_T[row]): row for row in completing}
        self.sources = [
            row_completing.get(block) if position and position % size == 0 else None
            for block, position in zip(self.before, self.first_positions, strict=True)
        ]
        """Row of this very step that computes the position before a sequence's first one."""
        self.states_T = np.zeros(len(self.ids_T), dtype=np.int64)
        self.round_T = np.zeros(len(self.ids_T), dtype=np.int64)
        """The round behind which a row's hidden state is final."""

    def plan(self) -> RaggedPlan:
        plan = RaggedPlan(shared=sum(source is not None for source in self.sources))
        for index in self._order():
            self._visit(index, plan)
        return plan

    def _order(self) -> list[int]:
        """Sequences, each behind the one it reads from."""
        order: list[int] = []
        done = np.zeros(len(self.ids_T), dtype=bool)
        waiting = list(range(len(self.bounds)))
        while waiting:
            ready = [i for i in waiting if self.sources[i] is None or done[self.sources[i]]]
            assert ready, "sequences that each go on from the other's block"
            for index in ready:
                done[slice(*self.bounds[index])] = True
            order += ready
            waiting = [i for i in waiting if i not in set(ready)]
        return order

    def _visit(self, index: int, plan: RaggedPlan) -> None:
        first, end = self.bounds[index]
        source, position = self.sources[index], self.first_positions[index]
        state, number = 0, 0
        if source is not None:
            state, number = int(self.states_T[source]), int(self.round_T[source])
        elif position:
            state = self.before_states[index]
        self.states_T[first:end] = self.automaton.along(state, self.ids_T[first:end])
        latent_rows = first + np.flatnonzero(self.ids_T[first:end] == self.automaton.latent_token_id)
        self.round_T[first:end] = number
        for row in latent_rows.tolist():
            if row == first and source is None:
                if position:
                    plan.known_rows.append(row)
                    plan.known_blocks.append(self.before[index])
                continue
            number += 1
            self.round_T[row:end] = number
            plan.rounds[number].append((row, source if row == first else row - 1))
            if row > first:
                plan.inner_rows.append(row)
                plan.forced_rows.append(row - 1)
        lasting = sorted({end - 1, *(first + np.flatnonzero(self.completes_T[first:end])).tolist()})
        plan.last_rows += lasting
        plan.last_blocks += self.blocks_T[lasting].tolist()
        plan.last_states += self.states_T[lasting].tolist()
        if steps_to_come(int(self.states_T[end - 1])):
            plan.forced_rows.append(end - 1)

    def _check_layout(self, step: Step, slots_T: np.ndarray, size: int) -> None:
        table_RK = step.block_table_RK[: len(self.bounds)].cpu().numpy()
        sequence_T = np.repeat(np.arange(len(self.bounds)), [end - first for first, end in self.bounds])
        rows = len(sequence_T)
        expected_T = table_RK[sequence_T, self.positions_T[:rows] // size] * size + self.positions_T[:rows] % size
        if not np.array_equal(expected_T, slots_T[:rows]):
            raise RuntimeError(
                f"vLLM's block table does not tell where positions are kept (blocks of {size} positions): latent "
                "steps cannot find their hidden states. Set the engine's block_size to one that the attention "
                "backend's kernel takes as it is (16 for FLASH_ATTN and TRITON_ATTN, 128 on CPU)"
            )
