"""Recipes: what a run does, read from YAML and checked before anything starts. Never imports torch."""
