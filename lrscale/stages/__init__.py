"""The stages of a run: one readable file each."""
