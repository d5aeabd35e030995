"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from lrscale.config.optimisation import ScheduleConfig


def learning_rate_at(schedule: ScheduleConfig, *, peak: float, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0 is the first) out of `total_steps`.

    Warm-up takes w = round(warmup_share x total_steps) steps, at peak x (step + 1) / (w + 1): it
    rises from 0 without spending a step there. `cosine` then falls from the peak to
    final_share x peak, which the last step reaches exactly.

    Raises ValueError for a step outside [0, total_steps).
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step is {step}; the schedule covers 0 to {total_steps - 1}")
    warmup = min(round(schedule.warmup_share * total_steps), total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule.kind == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    final = schedule.final_share
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
