"""Whether every node reaches the main one where the launchers are about to meet; before any launcher, without torch.

A launcher that cannot reach the others waits ten minutes and then names nobody. Here each node calls the main one at
the very host name and port, and leaves what came of it in the attempt's folder:

    attempts/N/meet-K.json     {"node": name, "problem": words or ""}, from node K; meet-0.json is the verdict
"""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrscale.config.diagnosis import Check

_WORD = b"lrscale"
_ONE_CALL_S = 5.0
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Place:
    """A node's part in the job, and where the main node is to be found."""

    folder: Path
    """The attempt's."""
    node: str
    index: int
    nodes: int
    host: str
    port: int
    limit_s: float = 60.0
    """For nodes that start late, and network file systems that show files late."""


def meet(place: Place) -> list[Check]:
    """On the main node, what was found; on others nothing, or the failed verdict. All nodes return together."""
    return _answer(place) if place.index == 0 else _call(place)


def _answer(place: Place) -> list[Check]:
    """The main node: answers calls until every node has told how its own went."""
    try:
        server = socket.create_server(("", place.port), backlog=256)
    except OSError as error:
        found = f"port {place.port} of {place.node} cannot be used: {error.strerror}"
        checks = [Check("rendezvous", "failed", found, needed="a free port", help="try again: another one is taken")]
        _tell(place, 0, fine=False)
        return checks
    with server:
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        heard: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + 2 * place.limit_s
        while len(heard) < place.nodes - 1 and time.monotonic() < deadline:
            for index in range(1, place.nodes):
                heard |= {index: told} if (told := _told(place, index)) is not None else {}
            time.sleep(_LOOK_S)
        server.shutdown(socket.SHUT_RDWR)
    checks = [_failed(told["node"], told["problem"]) for told in heard.values() if told["problem"]]
    silent = [index for index in range(1, place.nodes) if index not in heard]
    for index in silent:
        found = f"node {index} of the job has left no word in {place.folder} for {2 * place.limit_s:g} s"
        help_ = "does it see this folder? is it up? its node-*.log may say"
        checks.append(Check("rendezvous", "failed", found, needed="a word from every node", help=help_))
    _tell(place, 0, fine=not checks)
    return checks or [Check("rendezvous", "ok", f"{place.nodes - 1} nodes reach {place.host}:{place.port}")]


def _call(place: Place) -> list[Check]:
    deadline = time.monotonic() + place.limit_s
    while (problem := _problem(place)) and time.monotonic() < deadline:
        time.sleep(5 * _LOOK_S)
    _tell(place, place.index, node=place.node, problem=problem)
    deadline = time.monotonic() + 3 * place.limit_s
    while (verdict := _told(place, 0)) is None and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    if verdict is not None and verdict["fine"]:
        return []
    return [_failed(place.node, problem or "the main node has found that not all others reach it")]


def _serve(server: socket.socket) -> None:
    while True:
        try:
            peer, _ = server.accept()
        except OSError:  # closed
            return
        with peer:
            try:
                peer.settimeout(_ONE_CALL_S)
                peer.sendall(_WORD)
                peer.recv(1)  # the caller hangs up first, so that the port is free at once
            except OSError:
                continue


def _problem(place: Place) -> str:
    try:
        with socket.create_connection((place.host, place.port), timeout=_ONE_CALL_S) as connection:
            heard = connection.recv(64)
    except OSError as error:
        return f"{place.host}:{place.port} is out of reach: {error.strerror or error}"
    return "" if heard == _WORD else f"another program answers at {place.host}:{place.port}: {heard!r}"


def _failed(node: str, problem: str) -> Check:
    return Check(
        "rendezvous",
        "failed",
        problem,
        needed="a connection from every node to the main one",
        help="look at its name service (getent hosts), interfaces and firewall; cluster.interface names one",
        node=node,
        blames_node=True,
    )


def _tell(place: Place, index: int, **value: object) -> None:
    path = place.folder / f"meet-{index}.json"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def _told(place: Place, index: int) -> dict[str, Any] | None:
    try:
        return json.loads((place.folder / f"meet-{index}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
