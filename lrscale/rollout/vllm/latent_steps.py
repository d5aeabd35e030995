"""One forward of vLLM's model with latent positions in it.

A row whose token id is the latent one takes its input embedding from the projector, which read the hidden state
of the position before. That position was computed

    in an earlier step      its latent lies in the side buffers, under the KV block it is in
    in this very step       (prefill of a prompt with latents, recomputation after preemption, a prefix found in
                            a block that another request fills just now) the backbone runs again, once for each
                            latent of the longest chain

and whether a latent position follows a row is what the marker automaton says; such a row's hidden state is
overwritten with a value that tells `compute_logits` so. All of this is a function of the tokens before a
position and of the weights, which is what prefix caching takes for granted.

Legend as in step.py; H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrscale.rollout.vllm.latent_records import LatentRecords
from lrscale.rollout.vllm.position_automaton import PositionAutomaton, steps_to_come
from lrscale.rollout.vllm.ragged_plan import RaggedPlan
from lrscale.rollout.vllm.side_buffers import SideBuffers
from lrscale.rollout.vllm.step import Step

FORCED = 49152.0
"""Hidden state of a row that a latent position follows; exact in float16, bfloat16 and float32."""


@dataclass(slots=True)
class LatentSteps:
    """The forward of a model, given its parts."""

    automaton: PositionAutomaton
    embed: Callable[[Tensor], Tensor]
    """[N] ids to [N, H]."""
    backbone: Callable[[Tensor, Tensor], Tensor]
    """[N, H] input embeddings and [N] positions to hidden states after the final norm; leaves its argument as it is."""
    project: Callable[[Tensor], Tensor]
    buffers: SideBuffers
    records: LatentRecords | None = None

    def run(self, step: Step, input_ids: Tensor, *, fixed: bool) -> Tensor:
        """[N, H] hidden states of a step. `fixed` takes the way that CUDA graphs record, where there is one."""
        embeds = self.embed(input_ids.masked_fill(input_ids == self.automaton.latent_token_id, 0))
        if not step.single:
            if step.captured:
                raise RuntimeError("vLLM records a step of several positions a sequence in a full CUDA graph")
            return self._ragged(step, embeds)
        rows = _SingleRows.read(step, self.buffers, self.automaton)
        if fixed or step.captured:
            return self._single_fixed(step, embeds, rows)
        any_latent, any_stale, any_forced = torch.stack(
            [rows.latent_R.any(), rows.stale_R.any(), rows.forced_R.any()]
        ).tolist()
        if any_stale:
            return self._ragged(step, embeds)
        if any_latent:
            embeds[: step.sequences] = torch.where(
                rows.latent_R[:, None], self.buffers.latent[rows.before_R], embeds[: step.sequences]
            )
        hidden = self.backbone(embeds, step.positions_N)
        self.buffers.state[rows.block_R] = rows.state_R
        if any_forced:
            forced = rows.forced_R.nonzero().squeeze(1)
            latents = self.project(hidden[forced])
            self.buffers.latent[rows.block_R[forced]] = latents
            hidden = hidden.index_fill(0, forced, FORCED)
            self._record(step, forced, latents)
        else:
            self._record(step, rows.block_R[:0], embeds[:0])
        return hidden

    def _single_fixed(self, step: Step, embeds: Tensor, rows: _SingleRows) -> Tensor:
        """One position a sequence, the same work whatever the values are.

        A latent whose predecessor is computed in this very step cannot be had without a second pass: such a row
        ends in NaN, which the client refuses. It takes a prompt or a resumed sequence of which all but one
        position, a latent, are found in the cache, the last of them just being computed.
        """
        count = step.sequences
        embeds[:count] = torch.where(rows.latent_R[:, None], self.buffers.latent[rows.before_R], embeds[:count])
        hidden = self.backbone(embeds, step.positions_N)
        self.buffers.state[rows.block_R] = rows.state_R
        latents = self.project(hidden[:count])
        self.buffers.latent[torch.where(rows.forced_R, rows.block_R, self.buffers.spare)] = latents
        shown = torch.where(rows.forced_R[:, None], FORCED, hidden[:count])
        shown = torch.where(rows.stale_R[:, None], float("nan"), shown)
        return torch.cat([shown, hidden[count:]])

    def _ragged(self, step: Step, embeds: Tensor) -> Tensor:
        """Any number of positions a sequence; the order of the work is planned on the host."""
        plan = RaggedPlan.make(step, self.buffers, self.automaton)
        known, before = plan.known(embeds.device)
        embeds[known] = self.buffers.latent[before]
        hidden = self.backbone(embeds, step.positions_N)
        for rows, previous in plan.passes(embeds.device):
            embeds[rows] = self.project(hidden[previous])
            hidden = self.backbone(embeds, step.positions_N)
        latents = embeds[plan.inner(embeds.device)]
        last, last_blocks, states = plan.lasting(embeds.device)
        self.buffers.state[last_blocks] = states
        forced = steps_to_come(states) > 0
        lasting_latents = self.project(hidden[last[forced]])
        self.buffers.latent[last_blocks[forced]] = lasting_latents
        hidden = hidden.index_fill(0, plan.forced(embeds.device), FORCED)
        before_inner = plan.inner(embeds.device) - 1
        self._record(step, torch.cat([before_inner, last[forced]]), torch.cat([latents, lasting_latents]))
        return hidden

    def _record(self, step: Step, rows: Tensor, latents: Tensor) -> None:
        """Hand over the latents that follow `rows`."""
        if self.records is not None:
            self.records.add(step, rows, latents)


@dataclass(frozen=True, slots=True)
class _SingleRows:
    """What is known of each row before the backbone runs, where every sequence computes one position."""

    latent_R: Tensor
    before_R: Tensor
    """Block of the position before."""
    block_R: Tensor
    state_R: Tensor
    """Packed state behind the row."""
    stale_R: Tensor
    """A latent row whose predecessor is computed in this step."""

    @property
    def forced_R(self) -> Tensor:
        return steps_to_come(self.state_R) > 0

    @classmethod
    def read(cls, step: Step, buffers: SideBuffers, automaton: PositionAutomaton) -> _SingleRows:
        size, spare = buffers.block_size, buffers.spare
        position, ids = step.positions_T, step.ids_T
        alive = step.slots_T >= 0
        begun = alive & (position > 0)
        block = buffers.blocks_of(step.slots_T)
        before = torch.where(begun, step.blocks_before(position, size), spare)
        # A prefix may have been found in a block that another row completes in this step.
        completed = torch.where(alive & ((position + 1) % size == 0), block, spare)
        buffers.finishing_row[completed] = torch.arange(len(ids), device=ids.device)
        writer = torch.where(begun & (position % size == 0), buffers.finishing_row[before], -1)
        buffers.finishing_row[completed] = -1
        state = torch.where(begun, buffers.state[before], 0)
        state = torch.where(writer >= 0, automaton.advance(state, ids)[writer.clamp(min=0)], state)
        latent = (ids == automaton.latent_token_id) & begun
        return cls(latent, before, block, automaton.advance(state, ids), latent & (writer >= 0))
