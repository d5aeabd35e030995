"""The network of a job: every node reaches every other one, and all ranks sum a tensor in good time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from lrscale.config.diagnosis import Check
from lrscale.parallel.ranks import Ranks
from lrscale.stages.preflight.meeting import Meeting

_CONNECT_S = 10.0
_COLLECTIVE_S = 180.0
"""The first collective of NCCL on many nodes builds its rings, which takes a while."""
_GPU_MIB, _CPU_MIB = 256, 8
_ROUNDS = 5


def own_address(host: str) -> str:
    """The address of this machine's interface towards a host; nothing is sent. Raises OSError for an unknown name."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


@contextmanager
def listening(address: str, word: str) -> Iterator[int]:
    """Answers everybody who connects with the word, from a thread; gives the port."""
    with socket.create_server((address, 0), family=_family(address), backlog=128) as server:

        def answer() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                    with peer:
                        peer.sendall(word.encode())
                except OSError:  # closed: the time for questions is over
                    return

        threading.Thread(target=answer, daemon=True).start()
        try:
            yield int(server.getsockname()[1])
        finally:
            server.shutdown(socket.SHUT_RDWR)


def unreachable(peers: Mapping[str, tuple[str, int]], word: str, limit_s: float = _CONNECT_S) -> dict[str, str]:
    """Of nodes with their addresses and ports, those that do not answer with the word, and why."""
    with ThreadPoolExecutor(max_workers=max(len(peers), 1)) as pool:
        problems = dict(zip(peers, pool.map(lambda peer: _problem(peer, word, limit_s), peers.values()), strict=True))
    return {node: problem for node, problem in problems.items() if problem}


def reach_checks(nodes: list[str], problems: Mapping[str, Mapping[str, str]]) -> list[Check]:
    """From who cannot reach whom to the nodes that are to blame: those with most broken connections.

    Args:
        nodes: All of them, the main rank's first.
        problems: By node, the nodes that it could not reach.
    """
    name = "network"
    if len(nodes) == 1:
        return [Check(name, "not checked", "one node")]
    broken = {frozenset((node, other)) for node, others in problems.items() for other in others}
    if not broken:
        return [Check(name, "ok", f"each of {len(nodes)} nodes reaches every other one")]
    checks = []
    # The main rank's node comes last among equals: without it the job would have no address to meet at.
    for node in sorted(nodes, key=lambda n: (-sum(n in pair for pair in broken), n == nodes[0])):
        others = sorted(other for pair in broken if node in pair for other in pair if other != node)
        broken -= {pair for pair in broken if node in pair}
        if others:
            checks.append(
                Check(
                    name,
                    "failed",
                    f"no connection between it and {', '.join(others)}: {_words(problems, node, others)}",
                    needed="TCP between all nodes, on any port",
                    help="look at its interfaces and firewall (ip addr; NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)",
                    node=node,
                    blames_node=True,
                )
            )
    return checks


def check_all_reduce(meeting: Meeting, backend: str, device: torch.device) -> Check | None:
    """Sum a tensor over all ranks a few times, its result checked; the bandwidth on the main rank, else None.

    Leaves a process group, or a stuck thread, behind: the process should end after it.
    """
    ranks = meeting.ranks
    if ranks.world_size == 1:
        return Check("all-reduce", "not checked", "one rank")
    outcome: list[str | float] = []
    thread = threading.Thread(target=lambda: outcome.append(_timed_sum(meeting, backend, device)), daemon=True)
    thread.start()
    thread.join(_COLLECTIVE_S)
    meeting.tell("sum", outcome[0] if outcome else f"stuck for {_COLLECTIVE_S:g} s")
    if not ranks.is_main:
        return None
    heard = meeting.hear("sum", range(ranks.world_size), limit_s=30)
    return _sum_check(heard, ranks.world_size, backend, device)


def _sum_check(heard: Mapping[int, str | float], world_size: int, backend: str, device: torch.device) -> Check:
    name = "all-reduce"
    silent = [f"rank {rank}: no answer" for rank in range(world_size) if rank not in heard]
    broken = silent + [f"rank {rank}: {said}" for rank, said in heard.items() if isinstance(said, str)]
    if broken:
        return Check(
            name,
            "failed",
            f"{len(broken)} of {world_size} ranks did not come through. {'; '.join(broken[:4])}",
            needed=f"a sum over all ranks by {backend}",
            help="see the interfaces that it takes (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, NCCL_IB_HCA)",
        )
    slowest_s = max(float(said) for said in heard.values())
    count = _tensor_bytes(device)
    bandwidth = 2 * (world_size - 1) / world_size * count / slowest_s
    found = f"{world_size} ranks by {backend}: {count >> 20} MiB in {slowest_s * 1e3:.1f} ms, bus {bandwidth / 1e9:.2f} GB/s"
    return Check(name, "ok", found)


def _timed_sum(meeting: Meeting, backend: str, device: torch.device) -> float | str:
    """Seconds a sum, or what went wrong."""
    ranks = meeting.ranks
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has a current device of its own
        timeout = timedelta(seconds=_COLLECTIVE_S)
        dist.init_process_group(
            backend, store=meeting.store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout
        )
        expected = ranks.world_size * (ranks.world_size + 1) / 2
        tensor = torch.empty(_tensor_bytes(device) // 4, device=device)
        started = 0.0
        for round_ in range(_ROUNDS + 1):
            if round_ == 1:  # the first one has set up the connections
                _settle(device)
                started = time.perf_counter()
            tensor.fill_(ranks.rank + 1)
            dist.all_reduce(tensor)
        _settle(device)
        seconds = (time.perf_counter() - started) / _ROUNDS
        wrong = int((tensor != expected).sum().item())
    except (RuntimeError, OSError, ValueError) as error:
        return str(error).splitlines()[0]
    return f"{wrong} of {tensor.numel()} sums are wrong" if wrong else seconds


def leave(ranks: Ranks) -> None:
    """Leave the process group together."""
    if dist.is_initialized() and ranks.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tensor_bytes(device: torch.device) -> int:
    return (_GPU_MIB if device.type == "cuda" else _CPU_MIB) << 20


def _problem(peer: tuple[str, int], word: str, limit_s: float) -> str:
    try:
        with socket.create_connection(peer, timeout=limit_s) as connection:
            heard = b""
            while len(heard) < len(word) and (part := connection.recv(64)):
                heard += part
    except OSError as error:
        return f"{peer[0]}: {error.strerror or error}"
    return "" if heard == word.encode() else f"{peer[0]} answers with something else: another machine has its address"


def _words(problems: Mapping[str, Mapping[str, str]], node: str, others: list[str]) -> str:
    """Why a connection between a node and others failed, in the words of either end."""
    own = [words for other, words in problems.get(node, {}).items() if other in others]
    theirs = [problems[other][node] for other in others if node in problems.get(other, {})]
    return next(iter(own + theirs), "")


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
