"""What an engine process is given: a JSON file, no pickle and nothing in the environment."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrscale.rollout.vllm.engine_options import EngineOptions

_ELSEWHERE = ("192.0.2.1", 9)
"""Reserved for documentation: the way there is the default route, and nothing is sent."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One engine."""

    folder: str
    """The prepared model (lrscale.rollout.vllm.model_folder)."""
    latent_token_id: int
    address_file: str
    """Where the process writes {"url": ..., "pid": ...} once it listens; removed when it ends."""
    shared_folder: str = ""
    """The owner's folder in shared memory, for weights and latents."""
    host: str = "127.0.0.1"
    dtype: str = "auto"
    load_format: str = "dummy"
    """`dummy`: weights come by publication; `auto`: from the folder."""
    tensor_parallel: int = 1
    gpu_memory_share: float = 0.9
    max_model_len: int = 0
    """0 takes the model's."""
    max_num_seqs: int = 256
    enforce_eager: bool = False
    sleep: bool = False
    """Whether the engine can give its GPU's memory to the trainer."""
    latents: bool = False
    """Whether it keeps latents for `/latents`."""
    logprobs_mode: str = "raw_logprobs"
    seed: int = 0
    lifeline: bool = True
    """stdin is a pipe that the owner holds: the process ends with it."""

    @classmethod
    def read(cls, path: Path) -> EngineSettings:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    def engine_arguments(self) -> dict[str, Any]:
        """As vLLM's AsyncEngineArgs takes them."""
        arguments: dict[str, Any] = {
            "model": self.folder,
            "dtype": self.dtype,
            "load_format": self.load_format,
            "tensor_parallel_size": self.tensor_parallel,
            "gpu_memory_utilization": self.gpu_memory_share,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": self.enforce_eager,
            "logprobs_mode": self.logprobs_mode,
            "seed": self.seed,
            "worker_extension_cls": "lrscale.rollout.vllm.receiver.ServedWorker",
            "disable_log_stats": True,
            "trust_remote_code": False,
            "additional_config": EngineOptions(
                latents_folder=self.shared_folder if self.latents else None
            ).additional_config(),
        }
        if self.max_model_len:
            arguments["max_model_len"] = self.max_model_len
        return arguments

    def open_socket(self) -> socket.socket:
        """Bound to a free port that nobody else can take meanwhile; not listening yet."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((self.host, 0))
        return listener

    def announce(self, listener: socket.socket) -> None:
        """Tell the owner where to find this engine."""
        listener.listen(1024)
        host, port = listener.getsockname()[:2]
        if host == "0.0.0.0":
            host = own_address()
        path = Path(self.address_file)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"url": f"http://{host}:{port}", "pid": os.getppid()}), encoding="utf-8")
        temporary.rename(path)


def own_address() -> str:
    """This machine's address in the network; a loopback one only where it has no other.

    Not its name: /etc/hosts often makes that a loopback address, and then sends the trainer to its own node.
    """
    try:
        found = socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:
        found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(_ELSEWHERE)
        found.append(probe.getsockname()[0])
    return next((address for address in found if not address.startswith("127.")), "127.0.0.1")
