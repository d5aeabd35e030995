"""The cluster file: keys of a recipe's `cluster` section that all runs on a cluster share, below every recipe."""

from __future__ import annotations

from pathlib import Path

from lrscale.config.source import Document, read_file

FILE = Path("lrscale") / "cluster.yaml"
"""Under the folder for configuration ($XDG_CONFIG_HOME, else ~/.config)."""


def read_cluster_file(path: Path) -> Document:
    """As a recipe with nothing but a `cluster` section; an empty one where there is no such file.

    Raises:
        RecipeError: the file cannot be read, is no YAML, or says a key twice.
    """
    if not path.is_file():
        return Document()
    document = read_file(path)
    places = {("cluster", *key): place for key, place in document.places.items() if key}
    return Document({"cluster": document.values}, places)


def asks_for_slurm(document: Document) -> bool:
    """Whether a recipe is for SLURM: it names several nodes, other roles, or a partition."""
    cluster = document.values.get("cluster")
    if not isinstance(cluster, dict):
        return False
    nodes, split = cluster.get("nodes"), cluster.get("split")
    return (isinstance(nodes, int) and nodes > 1) or bool(split) or cluster.get("partition") is not None
