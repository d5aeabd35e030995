"""Small runs to simulate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lrscale.plan.simulation.lengths import LognormalLengths
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
        lengths=LognormalLengths(100.0, 0.6, 400),
        costs=COSTS,
        scoring=Scoring(8, LognormalLatency(1.0, 0.5)),
        engines=4,
        train_nodes=4,
        checkpoint_every=3,
        refresh_every=4,
    )
    return replace(some, **changes)
