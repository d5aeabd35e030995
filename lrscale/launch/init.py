"""The two files to begin with: the cluster file, from what SLURM says of itself, and a recipe with every key explained."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from lrscale.config.base import Section
from lrscale.config.recipe import Recipe
from lrscale.config.schema import kind_of, variants
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.slurm import Partition

_WIDTH = 110
_BEGINNING = """\
# A run of lrscale. What is commented out stands at its default; to change a key, take away its # and its section's.
#   lrscale launch {path}                       on this machine
#   lrscale launch {path} --nodes 2 --dry-run   the plan for SLURM
"""
_SET = {
    ("name",): "my-run",
    ("model", "path"): "Qwen/Qwen3-4B",
    ("model", "dtype"): "bfloat16",
    ("model", "gradient_checkpointing"): True,
    ("model", "chat_template"): True,
    ("projector", "kind"): "normalised",
}
"""What a recipe of one's own starts with, uncommented."""


def cluster_yaml(partitions: Mapping[str, Partition]) -> str:
    """A cluster file for the default partition, or the one with most GPUs; the others stand in comments."""
    chosen = max(partitions.values(), key=lambda one: (one.default, one.gpus_per_node, one.nodes))
    lines = ["# What all runs on this cluster share: keys of a recipe's `cluster` section, below every recipe."]
    lines += [f"#   {_described(one)}" for one in partitions.values()]
    lines += [f"partition: {_plain(chosen.name)}", f"gpus_per_node: {max(1, chosen.gpus_per_node)}"]
    lines += ["gpu_memory_gib: 80           # of one GPU, for the plan's arithmetic"]
    directive = "gpus-per-node" if chosen.gpus_per_node else "none"
    lines += [f"gpu_directive: {directive}  # gpus-per-node, gres, or none where whole nodes bring their GPUs"]
    limit = "2-00:00:00" if chosen.max_time_s is None else _clock(min(chosen.max_time_s, 172_800))
    lines += [f'time_limit: "{limit}"      # the run saves and goes back into the queue by itself']
    lines += [
        "# account: my-project",
        "# secrets: [HF_TOKEN]         # names of variables that jobs need; values are inherited, never written",
        "# interface: ib0              # for NCCL and gloo, where they choose the wrong one",
        "# modules: [cuda/12.8]",
        "# container: {kind: apptainer, image: /shared/lrscale.sif}    # or kind: pyxis",
        "# read_gib_s: 1.0             # of a node from the file system with the models",
        "# sbatch_flags: [--qos=normal]",
    ]
    return "\n".join(lines) + "\n"


def recipe_yaml(path: Path) -> str:
    """A recipe in which every key stands with its default and what it means."""
    lines = [_BEGINNING.format(path=path)]
    for name, field in Recipe.model_fields.items():
        default = field.get_default(call_default_factory=True)
        lines += (
            ["", *_entry((name,), default, field)] if isinstance(default, Section) else _entry((name,), default, field)
        )
    return "\n".join(lines) + "\n"


def write_new(path: Path, text: str, *, force: bool) -> bool:
    """Write a file unless it is there already; whether it was written.

    Raises:
        LaunchError: it cannot be written.
    """
    if path.exists() and not force:
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror}"
        raise LaunchError(message, code=ExitCode.PREFLIGHT, help="make room or rights there") from error
    return True


def _entry(key: tuple[str, ...], value: Any, field: FieldInfo) -> Iterator[str]:
    """A key or a whole section; what a recipe does not start with is commented out, sections as one block."""
    lines = list(_section(key, value, field) if isinstance(value, Section) else _key(key, value, field))
    if any(chosen[: len(key)] == key for chosen in _SET):
        yield from lines
    else:
        kept = "\n" if isinstance(value, Section) else "#"  # a key's comment is one already
        yield from (line if line.startswith(kept) else f"# {line}" for line in lines)


def _section(key: tuple[str, ...], section: Section, field: FieldInfo) -> Iterator[str]:
    kinds = [kind_of(choice) for choice in variants(field.annotation) if kind_of(choice)]
    yield f"{key[-1]}:" + (f"  # kinds: {', '.join(kinds)}" if len(kinds) > 1 else "")
    begun = any(chosen[: len(key)] == key for chosen in _SET)
    lines = list(_comment(type(section).__doc__))
    for name, inner in type(section).model_fields.items():
        value, inner_key = getattr(section, name), (*key, name)
        if begun:
            lines += _entry(inner_key, value, inner)
        else:  # the block as a whole is commented out
            lines += _section(inner_key, value, inner) if isinstance(value, Section) else _key(inner_key, value, inner)
    yield from (f"  {line}" for line in lines)


def _key(key: tuple[str, ...], value: Any, field: FieldInfo) -> Iterator[str]:
    line = f"{key[-1]}: {_plain(_SET.get(key, value))}"
    words = " ".join((field.description or "").split())
    if words and len(line) + len(words) + 4 <= _WIDTH:
        yield f"{line}  # {words}"
        return
    yield from _comment(words)
    yield line


def _comment(text: str | None) -> Iterator[str]:
    yield from (f"# {line}" for line in textwrap.wrap(" ".join((text or "").split()), _WIDTH))


def _plain(value: Any) -> str:
    """A value as YAML writes it on one line."""
    if isinstance(value, tuple):
        value = [item.model_dump(mode="json") if isinstance(item, Section) else item for item in value]
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _described(one: Partition) -> str:
    gpus = f", {one.gpus_per_node} GPUs" if one.gpus_per_node else ""
    limit = "no time limit" if one.max_time_s is None else f"at most {_clock(one.max_time_s)}"
    memory = f"{one.memory_mib / 1024:.0f} GiB"
    state = "" if one.up else ", down"
    return f"{one.name}: {one.nodes} nodes of {one.cpus_per_node} CPUs, {memory}{gpus}; {limit}{state}"


def _clock(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    return f"{days}-{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
