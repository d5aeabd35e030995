"""Weights by broadcast between members of a group, here threads of one process, over gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrscale.rollout.weight_files import Manifest, WrittenFiles
from lrscale.rollout.weight_group import Meeting, WeightGroup, meeting_address
from lrscale.rollout.weight_stream import ReceivedStream, SentStream
from lrscale.rollout.weights import PublicationError

CPU = torch.device("cpu")
WEIGHTS = {
    "layers.10.weight": torch.randn(3, 4),
    "layers.2.weight": torch.arange(5, dtype=torch.bfloat16),
    "scale": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "mask": torch.tensor([True, False, True]),
}


@contextmanager
def group(workers: int, *, limit_s: float = 20.0) -> Iterator[tuple[WeightGroup, list[WeightGroup]]]:
    """The main rank's end and those of an engine's workers."""
    meeting = Meeting([("127.0.0.1", 9)], workers, CPU, limit_s)
    with ThreadPoolExecutor(workers) as threads:
        joins = [threads.submit(WeightGroup.join, meeting.invitation("t", 0), place, CPU) for place in range(workers)]
        while meeting.absent("t"):
            assert not any(join.done() and join.exception() for join in joins)
        main = meeting.join("t")
        members = [join.result() for join in joins]
    try:
        yield main, members
    finally:
        for member in (*members, main):
            member.close()


def in_background(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - handed on
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def received(member: WeightGroup, version: int) -> dict[str, Tensor]:
    stream = ReceivedStream(member)
    try:
        stream.expect(version, projector_only=False)
        found = {name: tensor.clone() for name, tensor in stream.tensors()}
        stream.finish()
    except PublicationError as error:
        stream.refuse(str(error))
        raise
    return found


def send(stream: SentStream) -> None:
    for name, tensor in WEIGHTS.items():
        lent = tensor.clone()
        stream.add(name, lent)
        if lent.dtype != torch.bool:
            lent.zero_()  # a gathered tensor is gone when the next is asked for
    stream.finish()


def test_every_member_gets_the_bytes_that_files_would_carry(tmp_path: Path):
    """Locks out tensors overwritten while they travel, another order of buckets, and words left over for the next."""
    files = WrittenFiles(tmp_path / "v1", version=1, bucket_bytes=40)
    for name, tensor in WEIGHTS.items():
        files.add(name, tensor)
    buckets = Manifest.read(files.finish()).buckets
    with group(2) as (main, members):
        for version in (1, 2):
            arrivals = [in_background(lambda member=member, v=version: received(member, v)) for member in members]
            stream = SentStream(main, version=version, bucket_bytes=40)
            send(stream)
            for arrival in arrivals:
                found = arrival.result(30)
                assert found.keys() == WEIGHTS.keys()
                assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
                assert all(found[name].dtype == WEIGHTS[name].dtype for name in WEIGHTS)
            assert tuple(stream.sent) == buckets and len(buckets) > 1
            stream.forget()


def test_a_refusal_reaches_the_trainer_while_the_others_go_on():
    """Locks out a collective that hangs since one worker left it, and damage or an old version that nobody notices."""
    with group(2, limit_s=60) as (main, members):
        first, second = (in_background(lambda m=m, v=v: received(m, v)) for m, v in zip(members, (1, 7), strict=True))
        stream = SentStream(main, version=1, bucket_bytes=40)
        send(stream)
        assert first.result(30).keys() == WEIGHTS.keys()
        with pytest.raises(PublicationError, match="announced were version 7"):
            second.result(30)
        assert "announced were version 7" in (stream.refused() or "")
        stream.forget()
        assert stream.refused() is None

        say = main.say
        main.say = lambda key, words: say(key, words.replace('"checksum": ', '"checksum": 1'))  # type: ignore[method-assign]
        arrivals = [in_background(lambda member=member: received(member, 3)) for member in members]
        stream = SentStream(main, version=3)
        send(stream)
        for arrival in arrivals:
            with pytest.raises(PublicationError, match="arrived damaged"):
                arrival.result(30)
        stream.forget()

        arrivals = [in_background(lambda member=member: received(member, 4)) for member in members]
        stream = SentStream(main, version=4)
        stream.add("scale", WEIGHTS["scale"])
        stream.drop()
        for arrival in arrivals:
            with pytest.raises(PublicationError, match="the trainer gave it up"):
                arrival.result(30)


def test_nobody_waits_for_ever():
    """Locks out a trainer that hangs for a worker that stands still or died, and workers that wait for a dead trainer."""
    big = torch.zeros(40_000_000, dtype=torch.uint8)
    with group(1, limit_s=2) as (main, members):
        stream = SentStream(main, version=1)
        with pytest.raises(RuntimeError):  # the worker stands still
            stream.add("big", big)
            stream.finish()
    with group(2, limit_s=60) as (main, members):
        arrivals = [in_background(lambda member=member: received(member, 1)) for member in members[:1]]
        stream = SentStream(main, version=1)
        members[1].close()
        with pytest.raises(RuntimeError):
            stream.add("big", big)
            stream.finish()
        stream.drop()
        main.close()
        with pytest.raises(PublicationError, match=main.host):
            arrivals[0].result(60)
    meeting = Meeting([("127.0.0.1", 9), ("127.0.0.1", 8)], 1, CPU, 5)
    joining = in_background(lambda: WeightGroup.join(meeting.invitation("t", 0), 0, CPU))
    while meeting.absent("t") != [1]:
        assert not joining.done()


def test_a_group_meets_where_all_engines_reach_it(monkeypatch: pytest.MonkeyPatch):
    """Locks out a loopback address told to an engine on another node."""
    from lrscale.rollout import weight_group

    ways = {"127.0.0.1": "127.0.0.1", "10.0.0.7": "10.0.0.1"}
    monkeypatch.setattr(weight_group, "interface_towards", lambda host, port: ways[host])
    assert meeting_address([("127.0.0.1", 1), ("10.0.0.7", 1)]) == "10.0.0.1"
    assert meeting_address([("127.0.0.1", 1)]) == "127.0.0.1"
