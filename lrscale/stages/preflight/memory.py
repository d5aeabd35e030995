"""Host memory: enough to load the model on a node, within what SLURM or a container leaves this process."""

from __future__ import annotations

from pathlib import Path

from lrscale.config.diagnosis import Check
from lrscale.config.recipe import Recipe
from lrscale.stages.preflight.model_size import ModelSize, host_bytes


def check_memory(recipe: Recipe, size: ModelSize, node: str) -> Check:
    """Memory that is available on this node against what its ranks need while they load and train."""
    found = available_bytes()
    if found is None:
        return Check("host memory", "not checked", "the system does not tell (no /proc/meminfo)", node=node)
    available, limit = found
    needed = host_bytes(recipe, size)
    words = f"{available / 2**30:.1f} GiB available ({limit})"
    ranks = f"{recipe.ranks_per_node} ranks" if recipe.ranks_per_node > 1 else "one rank"
    needed_words = f"{needed / 2**30:.1f} GiB for {ranks}"
    if available >= needed:
        return Check("host memory", "ok", f"{words}, needed {needed_words}", node=node)
    return Check(
        "host memory",
        "failed",
        words,
        needed=needed_words,
        help="ask SLURM for all memory of the node, end other processes there, or take more nodes or less offload",
        node=node,
        blames_node=True,
    )


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, str] | None:
    """What processes here can still get, and whose limit that is; None where the system does not tell."""
    try:
        lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    limits = [(free, "of the machine")]
    for folder in _own_cgroups(proc, cgroups):
        try:
            most = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":  # files that were read count as used, and are given back on demand
            limits.append((int(most) - used + int(cached.get("inactive_file", 0)), f"of the cgroup {folder.name}"))
    return min(limits)


def _own_cgroups(proc: Path, cgroups: Path) -> list[Path]:
    """This process's cgroup (version 2) and those around it."""
    try:
        text = (proc / "self" / "cgroup").read_text(encoding="utf-8")
    except OSError:
        return []
    own = next((line.removeprefix("0::") for line in text.splitlines() if line.startswith("0::")), None)
    if own is None:
        return []
    folder = cgroups / own.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent == cgroups or cgroups in parent.parents)]
