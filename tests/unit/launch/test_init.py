"""The files that `lrscale init` writes have to be files that lrscale reads."""

from __future__ import annotations

import re
from pathlib import Path

from lrscale.config.cluster_file import read_cluster_file
from lrscale.config.load import flatten, load_recipe
from lrscale.config.recipe import Recipe
from lrscale.launch.init import cluster_yaml, recipe_yaml, write_new
from lrscale.launch.slurm import Partition


def partition(name: str, *, default: bool = False, gpus: int = 0, max_time_s: int | None = None) -> Partition:
    return Partition(
        name,
        default=default,
        up=True,
        nodes=4,
        nodes_usable=4,
        max_nodes=None,
        max_time_s=max_time_s,
        gpus_per_node=gpus,
        cpus_per_node=64,
        memory_mib=512_000,
    )


def test_the_recipe_is_read_and_names_every_key(tmp_path: Path) -> None:
    """Locks out a key that is added to a section and not explained, and YAML that an uncommented `#` breaks."""
    path = tmp_path / "recipe.yaml"
    text = recipe_yaml(path)
    path.write_text(text)
    assert load_recipe([path]).recipe.model.path == "Qwen/Qwen3-4B"
    for key in flatten(Recipe()):
        assert re.search(rf"^[ #]*{key.rsplit('.', 1)[-1]}: ", text, re.MULTILINE), key


def test_everything_uncommented_is_the_default(tmp_path: Path) -> None:
    """Locks out a default that is written in a form that YAML reads as something else (1e-4, null, a list)."""
    text = "\n".join(
        re.sub(r"^(\s*)# (?=\s*[a-z_]+:|\s+# )", r"\1", line) for line in recipe_yaml(Path("x")).splitlines()
    )
    path = tmp_path / "all.yaml"
    path.write_text(text)
    found, default = flatten(load_recipe([path]).recipe), flatten(Recipe())
    changed = {key for key in default if found[key] != default[key]}
    assert changed == {
        "name", "model.path", "model.dtype", "model.gradient_checkpointing", "model.chat_template", "projector.kind",
    }  # fmt: skip


def test_the_cluster_file_is_below_the_recipe(tmp_path: Path) -> None:
    """Locks out a cluster file that overrules a recipe, and one that is read for runs on this machine."""
    path = tmp_path / "cluster.yaml"
    both = {"cpu": partition("cpu", default=True, max_time_s=3600), "h100": partition("h100", gpus=8)}
    assert write_new(path, cluster_yaml(both), force=False) and not write_new(path, "", force=False)
    assert "h100: 4 nodes of 64 CPUs, 500 GiB, 8 GPUs; no time limit" in path.read_text()
    assert read_cluster_file(path).values["cluster"]["partition"] == "cpu"
    cluster = load_recipe((), ["cluster.time_limit=30:00"], slurm=True, cluster_file=path).recipe.cluster
    assert (cluster.partition, cluster.time_limit, cluster.gpu_directive) == ("cpu", "30:00", "none")
    assert load_recipe((), (), slurm=None, cluster_file=path).recipe.cluster.partition is None
