"""Messages between the pool and a worker: framed, and read without ever waiting for the rest of one.

All of it is JSON: a worker runs foreign code, and whatever it sends can spoil no more than its own sample.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lrscale.records import Prompt, Score, ScoreFailed
from lrscale.reward.source import CallNeeds, Needs, Passing, Result, Sample

_HEADER = struct.Struct("!Q")
_LONGEST = 1 << 28
"""Bytes of an answer; more is no answer of ours."""
_KINDS = ("timeout", "error", "invalid", "unavailable")


class Channel:
    """The pool's end of a worker's socket: sends and receives what can be had right now, never waits."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._out = bytearray()
        self._in = bytearray()

    def fileno(self) -> int:
        return self._end.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._out)

    def send(self, payload: bytes) -> None:
        """Queue a message and send what fits. A worker that has gone is found out about elsewhere."""
        self._out += _HEADER.pack(len(payload)) + payload
        self.flush()

    def flush(self) -> None:
        try:
            while self._out:
                del self._out[: self._end.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()

    def receive(self) -> list[bytes]:
        """The messages that are whole by now. EOFError where the worker has hung up or sends no messages of ours."""
        gone = False
        try:
            while chunk := self._end.recv(1 << 16):
                self._in += chunk
            gone = True
        except BlockingIOError:
            pass
        except OSError:
            gone = True
        messages = []
        while len(self._in) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._in)
            if length > _LONGEST:
                raise EOFError
            if len(self._in) < _HEADER.size + length:
                break
            messages.append(bytes(self._in[_HEADER.size : _HEADER.size + length]))
            del self._in[: _HEADER.size + length]
        if gone and not messages:
            raise EOFError
        return messages

    def close(self) -> None:
        self._end.close()


def write_message(end: socket.socket, payload: bytes) -> None:
    """The worker's way: waits until all is sent."""
    end.sendall(_HEADER.pack(len(payload)) + payload)


def read_message(end: socket.socket) -> bytes | None:
    """The worker's way: waits for a message; None when the pool has hung up."""
    header = _exactly(end, _HEADER.size)
    return None if header is None else _exactly(end, _HEADER.unpack(header)[0])


def sample_to_json(sample: Sample) -> str:
    """A sample as a part of a call. ValueError where a column holds what JSON has no form for."""
    prompt = sample.prompt
    fields = [prompt.prompt_id, prompt.text, dict(prompt.columns)]
    try:
        return json.dumps([fields, sample.completion, sample.completion_ids, sample.latent_steps])
    except TypeError as error:
        raise ValueError(
            f"reward: prompt {prompt.prompt_id!r} has a column that cannot be handed to a worker ({error}); "
            "columns hold texts, numbers, true, false, null, and lists and objects of these"
        ) from error


def call_to_bytes(samples: Sequence[str]) -> bytes:
    """A call over samples as `sample_to_json` writes them."""
    return f"[{','.join(samples)}]".encode()


def call_from_bytes(payload: bytes) -> list[Sample]:
    return [
        Sample(Prompt(*fields), completion, tuple(ids), latent_steps)
        for fields, completion, ids, latent_steps in json.loads(payload)
    ]


def answer_to_bytes(results: Sequence[Result], seconds: float) -> bytes:
    return json.dumps({"seconds": seconds, "results": [_to_json(result) for result in results]}).encode()


def answer_from_bytes(payload: bytes, count: int) -> tuple[list[Result], float]:
    """ValueError for anything but `count` results."""
    try:
        answer = json.loads(payload)
        results = [_from_json(entry) for entry in answer["results"]]
        seconds = float(answer["seconds"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no answer: {payload[:80]!r}") from error
    if len(results) != count or not math.isfinite(seconds):
        raise ValueError(f"{len(results)} results for {count} samples")
    return results, seconds


def greeting_to_bytes(needs: Needs | None, broken: str = "") -> bytes:
    """A worker's first words: what its source needs, or why it has none (`broken`)."""
    calls = [] if needs is None else [asdict(call) for call in needs.calls]
    return json.dumps({"calls": calls, "broken": broken}, default=sorted).encode()


def greeting_from_bytes(payload: bytes) -> tuple[Needs, str]:
    greeting = json.loads(payload)
    calls = tuple(
        CallNeeds(call["origin"], frozenset(call["own"]), frozenset(call["required"])) for call in greeting["calls"]
    )
    return Needs(calls), greeting["broken"]


def _to_json(result: Result) -> dict[str, Any]:
    if isinstance(result, Score):
        return {"value": result.value, "parts": dict(result.parts)}
    if isinstance(result, Passing):
        return {**_to_json(result.failure), "retry_after_s": result.retry_after_s}
    return {"kind": result.kind, "detail": result.detail}


def _from_json(entry: Any) -> Result:
    if "value" in entry:
        parts = {str(name): float(part) for name, part in entry["parts"].items()}
        value = float(entry["value"])
        if not all(map(math.isfinite, (value, *parts.values()))):
            return ScoreFailed("invalid", f"a worker answered {value}, needed a finite number")
        return Score(value, parts)
    if entry["kind"] not in _KINDS:
        raise ValueError(f"no kind of failure: {entry['kind']!r}")
    failure = ScoreFailed(entry["kind"], str(entry["detail"]))
    return Passing(failure, float(entry["retry_after_s"])) if "retry_after_s" in entry else failure


def _exactly(end: socket.socket, count: int) -> bytes | None:
    chunks = bytearray()
    while len(chunks) < count:
        chunk = end.recv(min(count - len(chunks), 1 << 20))
        if not chunk:
            return None
        chunks += chunk
    return bytes(chunks)
