"""Which process this is, as the launcher says in environment variables. The only user of os.environ.

Torch is imported where it is used: an agent says beforehand how much torch is to say.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

_LAUNCHER = "LRSCALE_LAUNCHER_PID"


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank within the node: the index of its GPU."""
    host: str = "127.0.0.1"
    """Where the main rank can be reached."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or self.local_rank < 0:
            raise ValueError(
                f"RANK={self.rank}, LOCAL_RANK={self.local_rank}, WORLD_SIZE={self.world_size}: "
                "needed 0 <= RANK < WORLD_SIZE and LOCAL_RANK >= 0; start with `lrscale launch` or `accelerate launch`"
            )

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once: metrics, checkpoints' manifests, reports."""
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        """Whether this process does what a node does once: own its engines, write its files."""
        return self.local_rank == 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR as torchrun and accelerate set them; one process without them."""
        return cls(
            rank=_integer("RANK", 0),
            world_size=_integer("WORLD_SIZE", 1),
            local_rank=_integer("LOCAL_RANK", 0),
            host=os.environ.get("MASTER_ADDR") or "127.0.0.1",
        )


def node_name() -> str:
    """This machine as SLURM calls it, or its host name outside of a SLURM job."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def visible_gpus() -> list[str]:
    """Names by which CUDA_VISIBLE_DEVICES can leave some of this process's GPUs to one that it starts."""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    import torch

    count = torch.cuda.device_count()
    return names[:count] or [str(index) for index in range(count)]


def not_given(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that the environment does not set already."""
    return {name: value for name, value in variables.items() if name not in os.environ}


def set_threads(threads: int | None) -> None:
    """CPU threads torch uses in this process; None leaves torch's own choice."""
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads: given {threads}, needed at least 1, or null for all cores")
    import torch

    torch.set_num_threads(threads)


def tell_libraries(ranks: Ranks, *, on_gpu: bool) -> None:
    """Sets what torch and DeepSpeed look for in the environment where a launcher has not: one process, no launcher."""
    for name, value in (("RANK", ranks.rank), ("WORLD_SIZE", ranks.world_size), ("LOCAL_RANK", ranks.local_rank)):
        os.environ.setdefault(name, str(value))
    if not on_gpu:  # DeepSpeed takes a GPU that it finds, whatever the recipe says, and warns where there is none
        os.environ["DS_ACCELERATOR"] = "cpu"


def import_torch_quietly() -> None:
    """Without C++ warnings in this process, which is to be an agent; the ranks that it starts keep theirs.

    Agents meet when their ranks are done, through a store that the first one holds. It may leave while the others
    still read its answer; each of them would end a sound run with a C++ stack of forty lines. Attempts to reach a host
    that does not answer yet are not told either: what comes of them is, and TORCH_CPP_LOG_LEVEL=INFO shows them.
    """
    level = "TORCH_CPP_LOG_LEVEL"
    if level in os.environ:  # someone wants to see them
        return
    os.environ[level] = "ERROR"
    try:
        import torch  # noqa: F401 - it reads the variable now, and never again
    finally:
        del os.environ[level]


def name_launcher() -> None:
    """Called by the launcher: the ranks that it starts know who it was, and end with it (`take_launcher`)."""
    os.environ[_LAUNCHER] = str(os.getpid())


def take_launcher() -> int | None:
    """Process id of the launcher, told once: what this rank starts in turn is not its launcher's business."""
    text = os.environ.pop(_LAUNCHER, "")
    return int(text) if text.isdigit() else None


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name}={text!r}: needed an integer, or unset it") from None
