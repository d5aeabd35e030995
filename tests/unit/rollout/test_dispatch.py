"""Handing sequences to engines: real HTTP servers that answer as an engine does, no vLLM."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lrscale.rollout.vllm.client import EngineError
from lrscale.rollout.vllm.dispatch import Limits, Round, Row

Answer = Callable[["Engine", dict[str, Any]], Iterator[dict[str, Any] | None]]


class Engine:
    """Answers /generate as `answer` says; a None from it breaks the connection, and the engine is dead from then on."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.seen: list[int] = []
        self.dead = False
        self.dies_with_latents = False
        self.calls = 0
        self.gate = threading.Event()
        self.url = ""


def finished(engine: Engine, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in body["rows"]:
        yield {"key": row["key"], "token_ids": [7], "logprobs": [0.0], "finish_reason": "stop", "latents": False}


def with_latents(engine: Engine, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for answer in finished(engine, body):
        yield answer | {"request": f"request-{answer['key']}", "latents": True}


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.engine.dead:
            self.close_connection = True
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"state": "ready"}).encode())

    def do_POST(self) -> None:
        if self.engine.dead:
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/latents":
            self.send_latents(body)
            return
        self.engine.calls += 1
        self.engine.seen += [row["key"] for row in body["rows"]]
        self.send_response(200)
        self.end_headers()
        for line in self.engine.answer(self.engine, body):
            if line is None:
                self.engine.dead = True
                return
            try:
                self.wfile.write(json.dumps(line).encode() + b"\n")
                self.wfile.flush()
            except OSError:
                return

    def send_latents(self, body: dict[str, Any]) -> None:
        self.engine.dead = self.engine.dies_with_latents
        if not self.engine.dead:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"latents of {body['requests'][0]}".encode())


@contextmanager
def served(answer: Answer = finished) -> Iterator[Engine]:
    engine = Engine(answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfEngine", (Handler,), {"engine": engine}))
    engine.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        engine.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


def round_over(engines: list[Engine], rows: int, **limits: Any) -> Round:
    given = {"timeout_s": 60.0, "rows_a_call": 2} | limits
    return Round([Row(key, [1, 2], seed=key) for key in range(rows)], [e.url for e in engines], {}, Limits(**given))


def keys(round_: Round) -> list[int]:
    return [answer["key"] for _, answer in round_]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


def test_work_goes_to_the_engine_that_has_least(stack: ExitStack):
    """Locks out rows dealt in turns: an engine that is stuck would hold up half of a step."""

    def stuck(engine: Engine, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        engine.gate.wait(60)
        yield from finished(engine, body)

    slow, fast = stack.enter_context(served(stuck)), stack.enter_context(served())
    found = []
    for _, answer in round_over([slow, fast], 24, window=4):
        found.append(answer["key"])
        if len(found) == 20:
            slow.gate.set()
    assert sorted(found) == list(range(24))
    assert (len(slow.seen), len(fast.seen)) == (4, 20)


def test_a_dead_engines_rows_are_sampled_again_and_none_twice(stack: ExitStack):
    """Locks out a step that lacks rows, or has some twice, after an engine died behind half of its answers."""

    def dies_half_way(engine: Engine, body: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        yield from list(finished(engine, body))[:1]
        yield None

    engines = [stack.enter_context(served(dies_half_way)), stack.enter_context(served())]
    round_ = round_over(engines, 16, window=8)
    assert Counter(keys(round_)) == Counter(range(16))
    assert round_.retried and not round_.left
    assert engines[0].dead and set(engines[0].seen) & set(engines[1].seen)


def test_latents_come_with_their_sequence_or_both_come_from_another_engine(stack: ExitStack):
    """Locks out a sequence of a dead engine without its latents, and one engine's latents with another's sequence."""
    dying, sound = stack.enter_context(served(with_latents)), stack.enter_context(served(with_latents))
    dying.dies_with_latents = True
    found = list(round_over([dying, sound], rows=6))
    assert sorted(answer["key"] for _, answer in found) == list(range(6))
    assert dying.seen and {url for url, _ in found} == {sound.url}
    assert all(answer["latents"].decode() == f"latents of request-{answer['key']}" for _, answer in found)


def test_rows_are_left_where_no_engine_lives(stack: ExitStack):
    """Locks out an endless wait, and rows that vanish, where the only engine dies: the caller brings up another one."""

    def dies(engine: Engine, body: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        if engine.calls == 1:
            yield from finished(engine, body)
        else:
            yield None

    engine = stack.enter_context(served(dies))
    round_ = round_over([engine], 8, window=2)
    done = keys(round_)
    assert len(done) == 2 and sorted([*done, *(row.key for row in round_.left)]) == list(range(8))
    again = Round(round_.left, [stack.enter_context(served()).url], {}, Limits(60.0))
    assert sorted(done + keys(again)) == list(range(8))


def test_an_answer_that_comes_twice_counts_once(stack: ExitStack):
    def twice(engine: Engine, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for line in finished(engine, body):
            yield line
            yield line

    assert Counter(keys(round_over([stack.enter_context(served(twice))], 6))) == Counter(range(6))


def test_a_late_sequence_is_sampled_again_then_ends_the_run(stack: ExitStack):
    """Locks out a run that waits for ever for one sequence, and one that gives up at the first hiccup."""

    def late_once(engine: Engine, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if engine.calls == 1:
            engine.gate.wait(60)
        yield from finished(engine, body)

    round_ = round_over([stack.enter_context(served(late_once))], 2, timeout_s=1.0)
    assert sorted(keys(round_)) == [0, 1] and round_.retried == 2

    def fails(engine: Engine, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from ({"key": row["key"], "error": "no room"} for row in body["rows"])

    with pytest.raises(EngineError, match=r"failed 3 times.*no room"):
        keys(round_over([stack.enter_context(served(fails))], 2))


def test_nobody_who_stops_listening_is_waited_for(stack: ExitStack):
    """Locks out a Ctrl-C that hangs until the longest sequence is finished."""

    def slowly(engine: Engine, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from finished(engine, body)
        engine.gate.wait(60)

    answers = iter(round_over([stack.enter_context(served(slowly))], 4))
    next(answers)
    started = time.monotonic()
    answers.close()
    assert time.monotonic() - started < 30
