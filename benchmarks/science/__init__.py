"""Does latent reasoning earn its place on a model of a million parameters? `run.py` measures, LOG.md tells."""
