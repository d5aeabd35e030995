"""The trainer's engines, checkpoints and trackers: the only importer of accelerate and deepspeed."""
