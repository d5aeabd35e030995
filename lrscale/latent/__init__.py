"""The method: markers, projector, and the three ways of running a policy with latents. Knows no ranks, no files."""

from lrscale.latent.expand import LatentMode
from lrscale.latent.marker import MarkerDetector
from lrscale.latent.policy import LatentPolicy, TokenOutput
from lrscale.latent.projector import ReasoningProjector

__all__ = ["LatentMode", "LatentPolicy", "MarkerDetector", "ReasoningProjector", "TokenOutput"]
