"""Ranks that talk before there is a process group: through the key-value store that their launcher opened.

A rank that is stuck, or whose network is broken, then shows as one that does not answer, with its name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lrscale.parallel.ranks import Ranks

_LOOK_S = 0.05


class Meeting:
    """One rank's side of the store. Values are JSON."""

    def __init__(self, ranks: Ranks, store: dist.Store) -> None:
        self.ranks = ranks
        self.store = store

    @classmethod
    def join(cls, ranks: Ranks, timeout: timedelta) -> Meeting:
        """Reach the store of the launcher, at MASTER_ADDR and MASTER_PORT. Raises RuntimeError where nobody answers."""
        if ranks.world_size == 1:
            return cls(ranks, dist.HashStore())
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
        return cls(ranks, dist.PrefixStore("preflight", store))

    def tell(self, subject: str, value: Any) -> None:
        """Say something to whoever asks this rank about it."""
        self.store.set(f"{subject}/{self.ranks.rank}", json.dumps(value))

    def hear(self, subject: str, ranks: Iterable[int], limit_s: float) -> dict[int, Any]:
        """What the ranks say about it, in their order, of those that have said something before the time is over."""
        waiting, heard = set(ranks), {}
        deadline = time.monotonic() + limit_s
        while True:
            for rank in sorted(waiting):
                if self.store.check([f"{subject}/{rank}"]):
                    heard[rank] = json.loads(self.store.get(f"{subject}/{rank}"))
            waiting -= heard.keys()
            if not waiting or time.monotonic() > deadline:
                return dict(sorted(heard.items()))
            time.sleep(_LOOK_S)

    def hear_main(self, subject: str, limit_s: float) -> Any:
        """What the main rank says. Raises TimeoutError."""
        heard = self.hear(subject, [0], limit_s)
        if not heard:
            raise TimeoutError(f"the main rank has said nothing about its {subject} for {limit_s:g} s")
        return heard[0]
