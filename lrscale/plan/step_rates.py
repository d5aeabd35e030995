"""The rates that decide how long an RL step takes; simulations work with these alone, and may be given measured ones."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepModel:
    """Rates of one run on one layout. Times in seconds, lengths in positions (tokens and latents)."""

    engines: int
    """That decode side by side, each with its share of the sequences."""
    gpus_per_engine: int
    prefill_positions_per_s: float
    """Of one engine."""
    shared_cache: bool
    """Whether an engine holds the keys and values of a group's prompt once (prefix caching). It computes them once in any
    case."""
    refills: bool
    """Whether a place that becomes free is taken by the next sequence at once."""
    step_s: float
    """Of a decoding step whatever it holds: scheduling, kernels, collectives between the engine's GPUs."""
    weights_s: float
    """To read the weights that every decoding step needs."""
    experts_s: float
    """To read all experts of a mixture; 0 for dense models."""
    expert_share: float
    """Chance that one token needs a given expert."""
    projector_s: float
    """To read the projector, in steps in which some sequence is at a latent position."""
    position_s: float
    """To read keys and values of one cached position."""
    row_s: float
    """To compute one position, the limit of large batches."""
    cache_positions: int
    """Positions that an engine's cache holds."""
    batch_limit: int
    """Sequences that an engine decodes at once at most, whatever the cache holds."""
    logprob_s: float
    """A position of one pass of log-probs over all training ranks together."""
    update_s: float
    """A position of the update, all training ranks together, collectives that do not hide included."""
    optimizer_s: float
    """An optimizer step."""
    publish_s: float
    """New weights into every engine."""
    projector_sft_s: float
    """Projector SFT before RL."""
    refresh_s: float
    """One refresh of the projector."""
    checkpoint_s: float
    """A checkpoint, during which nothing else happens."""
    load_s: float
    """The model from disk into trainer and engines."""
    start_s: float
    """From the job's start until the first rollout, reading the model left out: imports, process groups, what the engines'
    own start takes longer, and the first weights for them."""
    resume_s: float
    """To check and read a checkpoint, where there is one."""
    scoring_workers: int
    colocated: bool
    one_step_off: bool

    def decode_step_s(self, batch: float, context: float, latent_share: float = 0.0) -> float:
        """One more position for each of `batch` sequences of one engine, with `context` cached positions each.

        Bound by what is read from memory (weights once for the batch, each sequence's cache) or by products,
        whichever takes longer (Pope et al., arXiv 2211.05102, section 2).
        """
        if batch <= 0:
            return 0.0
        touched = 1 - math.pow(1 - self.expert_share, batch) if self.experts_s else 0.0
        projected = 1 - math.pow(1 - latent_share, batch)
        read_s = self.weights_s + touched * self.experts_s + projected * self.projector_s
        read_s += batch * context * self.position_s
        return self.step_s + max(read_s, batch * self.row_s)

    def max_batch(self, positions: float) -> int:
        """Sequences of so many positions that an engine decodes at once."""
        return max(1, min(self.batch_limit, int(self.cache_positions // max(1.0, positions))))

    def places(self, prompt_tokens: float, own: float, group: int) -> int:
        """Sequences that an engine decodes at once, with `own` positions behind a prompt that `group` of them share."""
        return self.max_batch(prompt_tokens / (group if self.shared_cache else 1) + own)

    def prefill_s(self, positions: float) -> float:
        """Prompts of so many positions in all, on one engine."""
        return positions / self.prefill_positions_per_s

    def rollout_s(
        self, prompts: int, group: int, prompt_tokens: float, lengths: Sequence[int], latents: float
    ) -> float:
        """Until the last of `prompts` x `group` sequences has ended; `lengths` are those of all completions.

        That of the engine with the longest sequence. Engines that refill their places go on as soon as one is free
        (continuous batching: Orca, OSDI 2022), others when all of a batch have ended. `latents` is the share of latent
        positions.
        """
        mine = sorted(lengths)[:: -max(1, self.engines)]  # the longest, and every so many-th below it
        order = [mine[index] for index in _strided(len(mine))]
        share = -(-prompts // self.engines)
        places = self.places(prompt_tokens, sum(order) / max(1, len(order)), group)
        batches = [order] if self.refills else [order[at : at + places] for at in range(0, len(order), places)]
        decoding_s = (self._decoded_s(batch, places, prompt_tokens, latents) for batch in batches)
        return self.prefill_s(share * prompt_tokens) + sum(decoding_s)

    def _decoded_s(self, lengths: Sequence[int], places: int, prompt_tokens: float, latents: float) -> float:
        """Until all have ended, at most `places` side by side; from one ending to the next the batch stays as it is."""
        running = [(length, 0) for length in lengths[:places]]  # the steps at which each ends, and began
        heapq.heapify(running)
        waiting = iter(lengths[places:])
        seconds, step, began = 0.0, 0, 0
        while running:
            ending = running[0][0]
            context = prompt_tokens + (step + ending) / 2 - began / len(running)
            seconds += (ending - step) * self.decode_step_s(len(running), context, latents)
            step = ending
            while running and running[0][0] == step:
                began -= heapq.heappop(running)[1]
                follower = next(waiting, None)
                if follower is not None:
                    heapq.heappush(running, (step + follower, step))
                    began += step
        return seconds


def _strided(count: int) -> Iterator[int]:
    """0 to count - 1 in an order that mixes small and large, always the same one."""
    stride = next((step for step in range(max(1, int(count * 0.618)), count) if _coprime(step, count)), 1)
    return (index * stride % count for index in range(count))


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1
