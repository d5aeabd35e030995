"""The arms of RL by name."""

from __future__ import annotations

from typing import Literal

Arm = Literal["latent", "discrete", "zero_latent", "shuffled_latent", "latent_free", "discrete_free"]
DISCRETE_ARMS: tuple[Arm, ...] = ("discrete", "discrete_free")
"""Ordinary RL, whose prompts say nothing of markers; the first that a run has is what its other arms are held against."""
LATENT_ARMS: tuple[Arm, ...] = ("latent", "shuffled_latent", "latent_free")
"""Those that compute latent steps."""
OWN_LATENT_ARMS: tuple[Arm, ...] = ("latent", "latent_free")
"""Those whose latents are the policy's own for the same row: what vLLM's engines decode."""
