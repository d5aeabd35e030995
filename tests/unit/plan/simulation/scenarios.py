"""Small runs to simulate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lrscale.plan.lengths import Lengths
from lrscale.plan.simulation.lengths import AssumedLengths
from lrscale.plan.simulation.scenario import Costs, LognormalLatency, Scenario, Scoring

COSTS = Costs(
    prefill_tokens_per_s=10_000.0,
    decode_s=lambda rows, context: 0.01 + 1e-4 * rows + 1e-6 * rows * context,
    max_rows=16,
    logprob_s_per_token=1e-4,
    update_s_per_token=3e-4,
    publish_s=1.0,
    refresh_s=5.0,
    checkpoint_s=4.0,
    start_s=20.0,
)


def scenario(**changes: Any) -> Scenario:
    """Four engines, 64 sequences a step of log-normal lengths, scores that take a second."""
    some = Scenario(
        steps=12,
        prompts_per_step=8,
        group_size=8,
        prompt_tokens=50,
        lengths=AssumedLengths(Lengths(100.0, 400, 0.6)),
        costs=COSTS,
        scoring=Scoring(8, LognormalLatency(1.0, 0.5)),
        engines=4,
        train_nodes=4,
        checkpoint_every=3,
        refresh_every=4,
    )
    return replace(some, **changes)


def fixed(tokens: int, latent_steps: int = 0) -> AssumedLengths:
    """All the same."""
    positions = tokens + latent_steps
    return AssumedLengths(Lengths(positions, positions, spread=0.0), latent_steps / positions)
