"""From a checked recipe to a run directory and a running job. Never imports torch or the runtime."""
