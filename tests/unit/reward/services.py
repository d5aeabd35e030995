"""Services on 127.0.0.1 that behave as real ones do on bad days."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


@contextmanager
def service(answer: Answer, port: int = 0) -> Iterator[str]:
    """Its URL; `answer` gets the handler and the request's body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            answer(self, json.loads(self.rfile.read(length)))

        def log_message(self, format: str, *arguments: Any) -> None:
            """Not on the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/get_reward"
    finally:
        server.shutdown()
        server.server_close()


def reply(handler: BaseHTTPRequestHandler, body: Any, status: int = 200, **headers: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def lengths(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """The reward is the completion's length."""
    pairs = zip(body["query"], body["prompts"], strict=True)
    reply(handler, {"rewards": [len(query) - len(prompt) for query, prompt in pairs]})


def trickle(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Half an answer, a byte at a time, for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def stall(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Headers, then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    time.sleep(60)


def hang_up(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Half an answer, and the connection is gone."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"rewards"')
    handler.connection.close()
