"""Ranks that agree: lengths of loops, decisions of the main rank, failures of any rank, results of all.

Under ZeRO-3 and FSDP2 every rank runs the same forwards and the same backward graph. Whatever depends on the
data goes through here. The traffic is small and on the CPU (gloo), beside the accelerators' own collectives.

With one process every method is the identity, so stages have one way of being written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lrscale.parallel.ranks import Ranks
from lrscale.parallel.watchdog import Watchdog, open_store

Result = TypeVar("Result")


class PeerError(RuntimeError):
    """Another rank failed in a section that all ranks run together; the message is its own."""


class Lockstep:
    """One process's view of its peers. A `Pace` for policies (lrscale.latent.pace)."""

    def __init__(self, ranks: Ranks, *, timeout: timedelta | None = None) -> None:
        """`torch.distributed` must be initialised where there is more than one rank."""
        self.ranks = ranks
        self.watchdog: Watchdog | None = None
        self._group = dist.new_group(backend="gloo", timeout=timeout) if ranks.world_size > 1 else None
        first = [rank for rank, local_rank in enumerate(self.gather_json(ranks.local_rank)) if local_rank == 0]
        self.node = sum(rank <= ranks.rank for rank in first) - 1
        """Its number. Ranks of a node are neighbours, as torchrun numbers them."""

    @property
    def alone(self) -> bool:
        return self._group is None

    def most(self, *counts: int) -> tuple[int, ...]:
        """Each count's maximum over all ranks. Every rank must call it, with as many counts."""
        if self.alone:
            return counts
        self._meet()
        tensor = torch.tensor(counts, dtype=torch.long)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tuple(tensor.tolist())

    def any(self, *, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return bool(self.most(int(flag))[0])

    def sum(self, value: Tensor) -> Tensor:
        """The same tensor summed over all ranks, on its own device, detached."""
        if self.alone:
            return value.detach().clone()
        self._meet()
        summed = value.detach().cpu().clone()
        dist.all_reduce(summed, group=self._group)
        return summed.to(value.device)

    def gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in the order of ranks."""
        if self.alone:
            return [payload]
        self._meet()
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.ranks.world_size)]
        dist.all_gather(sizes, torch.tensor([len(payload)]), group=self._group)
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8)
        if payload:
            mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        all_of_them = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(all_of_them, mine, group=self._group)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(all_of_them, sizes, strict=True)]

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in the order of ranks."""
        return [json.loads(part) for part in self.gather(json.dumps(value).encode())]

    def together(self, work: Callable[[], Result]) -> Result:
        """Run on every rank a piece of work in which ranks may fail one by one and that holds no collective.

        Raises:
            PeerError: another rank failed; a rank that failed itself raises what it met.
        """
        failure: Exception | None = None
        result: Result | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised again below, on every rank
            failure = error
        failures = self.gather_json(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, words in enumerate(failures):
            if words is not None:
                raise PeerError(f"rank {rank}: {words}")
        return result  # type: ignore[return-value]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run on the main rank alone; every rank gets its result (a JSON value), or its failure as PeerError."""
        if self.alone:
            return work()
        result = self.together(lambda: work() if self.ranks.is_main else None)
        return json.loads(self._from_main(json.dumps(result).encode() if self.ranks.is_main else b""))

    def on_each_node(self, work: Callable[[], Any]) -> list[Any]:
        """Run on the first rank of every node; every rank gets the results (JSON values), its own node's first.

        Raises:
            PeerError: it failed on another node.
        """
        if self.alone:
            return [work()]
        result = self.together(lambda: work() if self.ranks.is_first_of_node else None)
        told = self.gather_json([self.ranks.local_rank, result])
        by_node = [found for local_rank, found in told if local_rank == 0]
        return [by_node[self.node], *by_node[: self.node], *by_node[self.node + 1 :]]

    def _from_main(self, payload: bytes) -> bytes:
        """The main rank's payload, which may be large: nobody holds it as often as there are ranks."""
        self._meet()
        size = torch.tensor([len(payload)])
        dist.broadcast(size, src=0, group=self._group)
        values = torch.zeros(int(size), dtype=torch.uint8)
        if payload:
            values[:] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        if len(values):
            dist.broadcast(values, src=0, group=self._group)
        return values.numpy().tobytes()

    @contextmanager
    def phase(self, name: str, *, step: int | None = None) -> Iterator[None]:
        """Where this rank is, for the message about who is missing when ranks wait too long."""
        if self.watchdog is None:
            yield
            return
        with self.watchdog.phase(name if step is None else f"{name}, step {step}"):
            yield

    def tick(self) -> None:
        """This rank moves: for loops that ask the others nothing for a long time."""
        if self.watchdog is not None:
            self.watchdog.tick()

    def _meet(self) -> None:
        if self.watchdog is not None:
            self.watchdog.meet()

    def watch(self, *, limit_s: float, on_stall: Callable[[str], None]) -> None:
        """Start the watchdog, where there are other ranks. Collective."""
        if not self.alone:
            store = open_store(self.ranks, self.gather)
            self.watchdog = Watchdog(self.ranks, store, limit_s=limit_s, on_stall=on_stall)

    def refuse(self, words: str | None, error: type[Exception]) -> None:
        """Raise `error` on every rank where any rank has `words` about something that must not go on."""
        if not self.any(flag=words is not None):
            return
        found = [(rank, said) for rank, said in enumerate(self.gather_json(words)) if said is not None]
        raise error("; ".join(said if self.alone else f"rank {rank}: {said}" for rank, said in found))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.most(0)


ALONE = Lockstep(Ranks())
"""One process."""
