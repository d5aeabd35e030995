"""job.env: what slurm/train.sh, slurm/split.sh and launchers/node.sh have to know of a run, as shell variables."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from lrscale.config.cluster import ApptainerContainer, NoContainer, PyxisContainer
from lrscale.config.recipe import Recipe
from lrscale.plan.topology import topology


def job_env(recipe: Recipe, run_dir: Path, *, python: str, share: Path) -> str:
    """The file's text. Names of secrets are the most that stands in it; their values are inherited.

    Args:
        recipe: Resolved.
        run_dir: Absolute.
        python: The interpreter of ranks outside of a container.
        share: The folder with slurm/ and launchers/.
    """
    cluster, there = recipe.cluster, topology(recipe)
    split = cluster.split
    container = cluster.container
    scalars = {
        "python": python if isinstance(container, NoContainer) else container.python,
        "share": str(share),
        "nodes": there.nodes,
        "job_nodes": there.nodes if split.heterogeneous else there.nodes + there.other_nodes,
        "ranks_per_node": there.ranks_per_node,
        "max_restarts": cluster.max_restarts,
        "preflight": int(cluster.preflight),
        "timeout_minutes": -(-int(recipe.parallel.collective_timeout_s) // 60),
        "interface": cluster.interface or "",
        "heterogeneous": int(split.heterogeneous),
    }
    mounts = [str(run_dir), str(share)]
    lists: dict[str, Sequence[str]] = {
        "modules": cluster.modules,
        "container_flags": list(_pyxis_flags(container, mounts, cluster.secrets)),
        "container_command": list(_apptainer(container, mounts, on_gpu=there.gpus_per_node > 0)),
        "role_names": [role.name for role in split.roles],
        "role_nodes": [str(role.nodes) for role in split.roles],
        "role_commands": [role.command for role in split.roles],
    }
    lines = ["# Read by slurm/train.sh and launchers/node.sh; written by lrscale launch."]
    lines += [f"{name}={shlex.quote(str(value))}" for name, value in scalars.items()]
    lines += [f"{name}=({shlex.join(values)})" for name, values in lists.items()]
    return "\n".join(lines) + "\n"


def _pyxis_flags(container: object, mounts: Sequence[str], secrets: Sequence[str]) -> Iterator[str]:
    if isinstance(container, PyxisContainer):
        yield f"--container-image={container.image}"
        yield "--container-mounts=" + ",".join([*(f"{path}:{path}" for path in mounts), *container.mounts])
        if secrets:
            yield f"--container-env={','.join(secrets)}"


def _apptainer(container: object, mounts: Sequence[str], *, on_gpu: bool) -> Iterator[str]:
    if isinstance(container, ApptainerContainer):
        yield from ("apptainer", "exec", *(["--nv"] if on_gpu else []))
        for mount in (*mounts, *container.mounts):
            yield from ("--bind", mount)
        yield container.image
