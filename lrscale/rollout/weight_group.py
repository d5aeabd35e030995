"""The process group that weights travel in: the trainer's main rank (0) and every worker of every engine.

It stands apart from torch's default groups, of which trainer and workers have one each, and is built from torch's own
parts: a key-value store on the main rank, which carries words (JSON), and a backend, which carries bytes: NCCL between
GPUs, gloo between CPUs. A group belongs to the processes that formed it; engines that are replaced need a new one.

vLLM has an interface of its own for this (`vllm.distributed.weight_transfer`: `init_weight_transfer_engine`,
`update_weights`, and an engine for NCCL). It was read in 0.32.0 and does not serve here: tensors go into the model as
they arrive, with no place to check them first; its group (`StatelessProcessGroup`, `PyNcclCommunicator`) has no time-out
for a collective, so a dead peer hangs the trainer for good, and passes pickles over its store; it has no gloo; and the
trainer would have to have vLLM installed, which on nodes of its own it need not. What is used of vLLM is
`collective_rpc` and its layer-wise reloading, as for files.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LOOPBACK = "127."


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a worker needs to join. It travels as JSON."""

    address: str
    port: int
    token: str
    """Names the group, which is never formed twice."""
    backend: str
    """`nccl` or `gloo`."""
    size: int
    """Workers of all engines, and the trainer's main rank."""
    first: int
    """Number in the group of the first worker of the engine that is invited."""
    limit_s: float
    """Longest wait of anybody in the group for the others."""

    @property
    def host(self) -> str:
        """The main rank's end, for people."""
        return f"{self.address}:{self.port}"


class WeightGroup:
    """One member's end of it. Members send words by `say` and `hear`, and bytes by `broadcast`."""

    def __init__(self, store: Any, invitation: Invitation, number: int, device: torch.device) -> None:
        """Meets the others; blocks until all are there. RuntimeError where they are not within the limit."""
        self.token = invitation.token
        self.host = invitation.host
        self.limit_s = invitation.limit_s
        self.number = number
        self.device = device if invitation.backend == "nccl" else torch.device("cpu")
        self._store = dist.PrefixStore(invitation.token, store)
        self._backend: Any = _backend(self._store, invitation, number)
        self._under_way: tuple[dist.Work, Tensor] | None = None

    @classmethod
    def join(cls, invitation: Invitation, worker: int, device: torch.device) -> WeightGroup:
        """The end of worker `worker` of the engine that was invited."""
        store = dist.TCPStore(
            invitation.address, invitation.port, is_master=False, timeout=timedelta(seconds=invitation.limit_s)
        )
        number = invitation.first + worker
        dist.PrefixStore(invitation.token, store).set(_here(number), str(number))
        return cls(store, invitation, number, device)

    def say(self, key: str, words: str) -> None:
        self._store.set(key, words)

    def hear(self, key: str) -> str:
        """Waits until somebody has said it. RuntimeError after the limit, or where the main rank is gone."""
        return str(self._store.get(key).decode())

    def said(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def forget(self, key: str) -> None:
        """What everybody has heard."""
        self._store.delete_key(key)

    def broadcast(self, payload: Tensor) -> None:
        """Begin to bring the main rank's bytes to all. One at a time: `wait` for it before the next.

        Only the group holds what is under way: connections stay open as long as anything, a traceback's frame too,
        does, and the others' waiting ends when they close.
        """
        assert self._under_way is None
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=self.limit_s)
        self._under_way = self._backend.broadcast([payload], options), payload

    @property
    def idle(self) -> bool:
        """Nothing is under way, or it has ended, well or not."""
        return self._under_way is None or bool(self._under_way[0].is_completed())

    def wait(self) -> None:
        """For what is under way. RuntimeError where it failed, or takes longer than the limit."""
        if self._under_way is not None:
            self._under_way[0].wait(timedelta(seconds=self.limit_s))
            self._under_way = None

    def close(self) -> None:
        """Leave. Members that still wait for this one fail."""
        if self._backend is not None and self._backend.name() == "nccl":
            self._backend.abort()
        self._under_way = self._backend = self._store = None


class Meeting:
    """The main rank's side of forming a group: listens, invites, and joins when everybody has come."""

    def __init__(self, towards: Sequence[tuple[str, int]], workers: int, device: torch.device, limit_s: float) -> None:
        """`towards` are the engines' addresses, with `workers` workers each."""
        self._engines = len(towards)
        self._workers = workers
        self._device = device
        self._limit_s = limit_s
        self._address = meeting_address(towards)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind((self._address, 0))  # the one interface that leads to the engines, and a free port
            listener.listen(1024)
            self._port = listener.getsockname()[1]
            self._store = dist.TCPStore(
                self._address,
                self._port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=limit_s),
                master_listen_fd=listener.detach(),
            )

    def invitation(self, token: str, engine: int) -> Invitation:
        return Invitation(
            address=self._address,
            port=self._port,
            token=token,
            backend="nccl" if self._device.type == "cuda" else "gloo",
            size=1 + self._engines * self._workers,
            first=1 + engine * self._workers,
            limit_s=self._limit_s,
        )

    def absent(self, token: str) -> list[int]:
        """Places, among the engines, of those that have not all of their workers here."""
        store = dist.PrefixStore(token, self._store)
        numbers = range(1, 1 + self._engines * self._workers)
        return sorted({(number - 1) // self._workers for number in numbers if not store.check([_here(number)])})

    def join(self, token: str) -> WeightGroup:
        """The main rank's end, when nobody is absent any more."""
        return WeightGroup(self._store, self.invitation(token, 0), 0, self._device)


def meeting_address(towards: Sequence[tuple[str, int]]) -> str:
    """This machine's address as all of the others reach it: a loopback address only where all of them are here."""
    own = [interface_towards(host, port) for host, port in towards]
    return next((address for address in own if not address.startswith(_LOOPBACK)), own[0])


def interface_towards(host: str, port: int) -> str:
    """Address of the interface that leads there. OSError where none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def _here(number: int) -> str:
    return f"here/{number}"


def _backend(store: Any, invitation: Invitation, number: int) -> Any:
    make: Callable[..., Any] = _nccl if invitation.backend == "nccl" else _gloo
    return make(store, invitation, number)


def _gloo(store: Any, invitation: Invitation, number: int) -> Any:
    """Underscored, for torch sets interfaces by a variable of the environment otherwise, one for all of its groups."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=invitation.limit_s)
    address = invitation.address if number == 0 else interface_towards(invitation.address, invitation.port)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, number, invitation.size, options)


def _nccl(store: Any, invitation: Invitation, number: int) -> Any:
    """torch ends a process whose collective takes too long, so its own time-out comes after ours, which raises."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=2 * invitation.limit_s)
    return dist.ProcessGroupNCCL(store, number, invitation.size, options)
