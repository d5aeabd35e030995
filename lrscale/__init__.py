"""lrscale: latent reasoning (LiteReason) for language models, from a laptop to a SLURM cluster."""

__version__ = "0.1.0"
