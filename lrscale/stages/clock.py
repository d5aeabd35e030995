"""Timers that wait for the GPU: its work is only queued when a call returns, and would count in the next phase."""

from __future__ import annotations

import torch

from lrscale.latent import LatentPolicy
from lrscale.report.timing import PhaseTimer


def phase_timer(policy: LatentPolicy, *phases: str) -> PhaseTimer:
    """A PhaseTimer for work on the policy's device."""
    return PhaseTimer(*phases, synchronise=torch.cuda.synchronize if policy.device.type == "cuda" else None)
