"""Weights to engines, and the proof that they arrived: the one owner of engines and of publications.

All ranks of the trainer call it together. One of them owns the engines: the main rank where they run elsewhere, the
first rank of each node where every node has its own. Every rank takes the gathered weights to their end; each owner
hands them to its engines.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lrscale.rollout.vllm.client import EngineError, lives, probe
from lrscale.rollout.vllm.fleet import Fleet
from lrscale.rollout.vllm.transport import Transport
from lrscale.rollout.weights import PublicationError, Transfer, publication

if TYPE_CHECKING:
    from lrscale.latent import LatentPolicy

_TRIES = 3
_PROBE_TEXTS = ("Anna goes to the mill. ", "So the answer is: ")
_PROBE_STEPS = (2, 1)
_PROBE_TOKENS = 32


class Peers(Protocol):
    """The ranks of the trainer."""

    def on_main(self, work: Callable[[], Any]) -> Any: ...

    def on_each_node(self, work: Callable[[], Any]) -> list[Any]: ...

    def any(self, *, flag: bool) -> bool: ...

    def tick(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Delivery:
    """How weights travel, and what proves that they arrived."""

    latent_token_id: int
    probe_tolerance: float
    timeout_s: float
    """Of one request to an engine."""
    transport: Transport | None = None
    """None on ranks that own no engines."""
    shared: Path | None = None
    """The owner's folder in shared memory, removed in the end."""
    by_node: bool = False
    """Whether every node has engines of its own."""


class Publisher:
    """Keeps engines at the trainer's weights."""

    def __init__(
        self,
        policy: LatentPolicy,
        parameters: Callable[[], Iterable[tuple[str, Tensor]]],
        peers: Peers,
        delivery: Delivery,
        fleet: Fleet | None,
    ) -> None:
        """`parameters` gathers all weights (collective). The `fleet` is an owner's, None on other ranks."""
        self._policy = policy
        self._parameters = parameters
        self._peers = peers
        self.fleet = fleet
        self._delivery = delivery
        self.transport = delivery.transport
        self._latent_token_id = delivery.latent_token_id
        self._tolerance = delivery.probe_tolerance
        self._timeout_s = delivery.timeout_s
        self._usable: list[str] = []
        self.last_gap = 0.0
        """Largest |log-prob of the engine - of the trainer| of the last probe."""
        self.last_seconds = 0.0

    def usable(self) -> list[str]:
        """Addresses of the engines that had the current weights when it was last looked: this node's, or all."""
        return list(self._usable)

    def publish(self, parameters: Iterable[tuple[str, Tensor]], *, version: int, projector_only: bool = False) -> None:
        """Bring every engine to these weights, those that had died included. Collective.

        Raises:
            PublicationError: an engine has other weights afterwards. It is not to be sampled from.
        """
        started = perf_counter()
        self._bring(version, parameters=parameters, projector_only=projector_only)
        self.last_seconds = perf_counter() - started

    def revive(self, version: int) -> None:
        """Bring up engines that have died, with the weights that the trainer has now, version `version`. Collective."""
        self._bring(version, only_behind=True)

    def _bring(
        self,
        version: int,
        *,
        parameters: Iterable[tuple[str, Tensor]] | None = None,
        projector_only: bool = False,
        only_behind: bool = False,
    ) -> None:
        """To all engines, or those that are behind; once more, and whole, where one has died over it."""
        for _ in range(_TRIES):
            states, *elsewhere = self._on_owners(self._awake)
            urls = [url for url, has in states.items() if not only_behind or has != version]
            self._usable = list(states)
            if not self._peers.any(flag=bool(urls)):
                return
            fresh = any(has is None for of_node in (states, *elsewhere) for has in of_node.values())
            if parameters is None or (projector_only and fresh):
                parameters, projector_only = self._parameters(), False
            if self._send(parameters, urls, version, projector_only=projector_only):
                self._verify(urls, version)
                return
            parameters = None
        raise PublicationError(
            f"rollout engines died {_TRIES} times over the weights of version {version}; see their logs"
        )

    def sleep(self) -> None:
        """Engines that share the trainer's GPUs give them up. Collective."""

        def give_up() -> None:
            assert self.fleet is not None
            self.fleet.tell(self.fleet.addresses(), "/sleep", {"level": 2}, timeout_s=self._timeout_s)

        self._on_owners(give_up)

    def close(self) -> None:
        """End the engines of this process; nothing of them stays in shared memory."""
        if self.fleet is not None:
            self.fleet.close()
        if self.transport is not None:
            self.transport.close()
        if self._delivery.shared is not None:
            shutil.rmtree(self._delivery.shared, ignore_errors=True)

    def _on_owners(self, work: Callable[[], Any]) -> list[Any]:
        """What the owners of engines found, this rank's own first."""
        return self._peers.on_each_node(work) if self._delivery.by_node else [self._peers.on_main(work)]

    def _awake(self) -> dict[str, int | None]:
        """Every engine up and ready to take weights: its address and the version it has."""
        assert self.fleet is not None
        healthy = self.fleet.ready()
        asleep = [url for url, said in healthy.items() if said["state"] == "asleep"]
        self.fleet.tell(asleep, "/wake", {"tags": ["weights"]}, timeout_s=self._timeout_s)
        return {url: said["version"] for url, said in healthy.items()}

    def _send(
        self, parameters: Iterable[tuple[str, Tensor]], urls: list[str], version: int, *, projector_only: bool
    ) -> bool:
        """False where an engine, of whatever owner, has died over it."""
        transport = self.transport
        begin: Callable[[], Transfer] | None = None
        if transport is not None and urls:
            begin = partial(transport.begin, urls, version=version, projector_only=projector_only)
        with publication(parameters, begin, tick=self._peers.tick) as sent:

            def deliver() -> bool:
                if sent is None:
                    return True  # no engine of this owner lacks these weights
                assert self.fleet is not None
                try:
                    if isinstance(sent, Exception):
                        raise sent
                    sent.finish()
                    self.fleet.tell(urls, "/wake", {"tags": ["kv_cache"]}, timeout_s=self._timeout_s)
                except (EngineError, PublicationError) as error:
                    if not all(lives(url) for url in urls):
                        return False
                    raise PublicationError(f"weights of version {version} were not taken over: {error}") from error
                return True

            return all(self._on_owners(deliver))

    def _verify(self, urls: list[str], version: int) -> None:
        """Fixed prompts through the trainer and every engine."""
        rows = list(self._probe_rows())
        expected = self._expected(rows)

        def compare() -> float:
            prompts = [list(ids) for _, ids in rows]
            worst = 0.0
            for url in urls:
                found, of_version = probe(url, prompts, timeout_s=self._timeout_s)
                if of_version != version:
                    raise PublicationError(
                        f"{url} answers with weights of version {of_version}, published was {version}"
                    )
                worst = max(worst, *(self._gap(*pair) for pair in zip(rows, found, expected, strict=True)))
                if not worst <= self._tolerance:
                    raise PublicationError(
                        f"{url} does not have the weights of version {version}: log-probs of the probe differ from the "
                        f"trainer's by {worst:.3g}, rollout.probe_tolerance is {self._tolerance:g}. The run ends, since "
                        "samples of other weights than those that are trained would go unnoticed"
                    )
            return worst

        self.last_gap = max(self._on_owners(compare))

    def _gap(self, row: tuple[list[int], list[int]], found: list[float], expected: list[float]) -> float:
        """Over the discrete tokens but the first."""
        own = [value for token, value in zip(row[1][1:], found, strict=True) if token != self._latent_token_id]
        gaps = [abs(ours - theirs) for ours, theirs in zip(own, expected, strict=True)]
        return max(gaps) if all(gap == gap for gap in gaps) else float("nan")

    def _probe_rows(self) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids, as the trainer reads them and as an engine does; with a marker each, so that the projector counts."""
        policy = self._policy
        for text, steps in zip(_PROBE_TEXTS, _PROBE_STEPS, strict=True):
            words = policy.encode(text)[:_PROBE_TOKENS]
            head = [*words, *policy.marker_ids(steps)]
            taken = min(steps, policy.max_latent_steps)
            yield [*head, *words], [*head, *[self._latent_token_id] * taken, *words]

    @torch.no_grad()
    def _expected(self, rows: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        width = max(len(ids) for ids, _ in rows)
        device = self._policy.device
        ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in rows], device=device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows], device=device)
        out = self._policy.expand(ids_BT, mask_BT)
        logprobs_BT = self._policy.token_logprobs(out.hidden_BTH, ids_BT, where_BT=mask_BT)
        return [row[1 : len(ids)].tolist() for row, (ids, _) in zip(logprobs_BT, rows, strict=True)]
