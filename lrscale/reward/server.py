"""A reward function as a service, under the contract of `lrscale.reward.remote`: many nodes share one pool.

    python -m lrscale.reward.server FILE.py [--name NAME] [--host HOST] [--port PORT] [--workers N] [--timeout-s S]

prints the URL on stdout once it can score. Exit codes: 0 ended, 2 usage, 3 the file does not load, 6 it cannot serve.
Needs the extra `serve` (FastAPI, uvicorn).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrscale.records import Prompt, Score, ScoreFailed
from lrscale.reward.functions import FunctionSpec
from lrscale.reward.limits import Limits
from lrscale.reward.pool import Pool
from lrscale.reward.source import Sample
from lrscale.reward.worker import WorkerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

BAD_FILE, FAILED, INTERRUPTED = 3, 6, 130
_REQUESTS = 256
"""Answered at a time; more wait."""
SERVE_HELP = "serving rewards needs FastAPI and uvicorn: pip install 'lrscale[serve]'"


class Desk:
    """Takes requests from many threads to one pool, and gives each its own answers back."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._numbers = itertools.count()
        self._answered = threading.Condition()
        self._results: dict[int, Score | ScoreFailed] = {}
        self._thread = threading.Thread(target=self._collect, name="reward-desk", daemon=True)
        self._asked = threading.Event()
        self._failure: RuntimeError | None = None
        self._thread.start()

    def score(self, samples: Sequence[Sample]) -> list[Score | ScoreFailed]:
        """Blocks until all are scored. RuntimeError when the pool is gone."""
        numbers = [next(self._numbers) for _ in samples]
        for number, sample in zip(numbers, samples, strict=True):
            self._pool.submit(number, sample)
        self._asked.set()
        with self._answered:
            while not all(number in self._results for number in numbers):
                if self._failure is not None:
                    raise RuntimeError(str(self._failure)) from self._failure
                self._answered.wait()
            return [self._results.pop(number) for number in numbers]

    def _collect(self) -> None:
        try:
            while True:
                self._asked.wait()
                self._asked.clear()
                done = False
                while not done:
                    done = self._pool.wait(0.02)
                    new = self._pool.take()
                    if new:
                        with self._answered:
                            self._results |= new  # type: ignore[arg-type]
                            self._answered.notify_all()
        except RuntimeError as error:
            with self._answered:
                self._failure = error
                self._answered.notify_all()


def samples_of(body: Any) -> list[Sample]:
    """The samples of a request. ValueError where it is none under the contract."""
    if not isinstance(body, dict) or not all(isinstance(body.get(key), list) for key in ("query", "prompts")):
        raise ValueError('needed: {"query": [...], "prompts": [...], "labels": [...]}, lists of texts')
    queries, prompts = body["query"], body["prompts"]
    labels = body.get("labels") or [None] * len(queries)
    if not isinstance(labels, list) or not len(queries) == len(prompts) == len(labels):
        raise ValueError("`query`, `prompts` and `labels` must be lists of one length")
    samples = []
    for index, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True)):
        if not isinstance(query, str) or not isinstance(prompt, str) or not query.startswith(prompt):
            raise ValueError(f"query {index} does not start with its prompt, so its completion cannot be told")
        samples.append(Sample(Prompt(f"{index}", prompt, {"answer": label}), query[len(prompt) :], ()))
    return samples


def answer_of(results: Sequence[Score | ScoreFailed]) -> dict[str, Any]:
    """The answer: null, and the reason in `failures`, for what could not be scored."""
    failures = {
        str(index): {"kind": result.kind, "detail": result.detail}
        for index, result in enumerate(results)
        if isinstance(result, ScoreFailed)
    }
    rewards = [result.value if isinstance(result, Score) else None for result in results]
    return {"rewards": rewards, **({"failures": failures} if failures else {})}


def reward_app(desk: Desk) -> FastAPI:
    """POST / or /get_reward (OpenRLHF's path) scores, GET /health tells that it is up."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

    threads = ThreadPoolExecutor(_REQUESTS)  # each waits for its scores
    app = FastAPI(title="lrscale reward", docs_url=None, redoc_url=None, openapi_url=None)

    async def score(request: Request) -> JSONResponse:
        try:
            samples = samples_of(await request.json())
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=422)
        try:
            results = await asyncio.get_running_loop().run_in_executor(threads, desk.score, samples)
        except RuntimeError as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        return JSONResponse(answer_of(results))

    # FastAPI reads annotations, which are texts in this file: it is told the types of a local name.
    score.__annotations__ = {"request": Request, "return": JSONResponse}
    for path in ("/", "/get_reward"):
        app.add_api_route(path, score, methods=["POST"], response_model=None)
    app.add_api_route("/health", lambda: {"ready": True}, methods=["GET"])
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lrscale.reward.server", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("file", type=Path, help="a Python file with a reward function")
    parser.add_argument("--name", default="", help="the function in it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    parser.add_argument("--memory-mib", type=int, default=8192)
    options = parser.parse_args(arguments)
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError:
        print(f"error: {SERVE_HELP}", file=sys.stderr)
        return FAILED
    try:
        bound = socket.create_server((options.host, options.port))
    except OSError as error:
        print(
            f"error: cannot listen on {options.host}:{options.port}: {error.strerror}; give another --port",
            file=sys.stderr,
        )
        return FAILED
    spec = FunctionSpec(str(options.file.absolute()), options.name)
    limits = Limits(workers=options.workers, timeout_s=options.timeout_s)
    with bound, closing(Pool(spec, limits, WorkerSettings(memory_mib=options.memory_mib))) as pool:
        try:
            origin = pool.needs().calls[0].origin
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_FILE
        host, port = bound.getsockname()[:2]
        print(f"serving {origin}", file=sys.stderr)
        print(f"http://{host}:{port}/get_reward", flush=True)
        config = uvicorn.Config(reward_app(Desk(pool)), log_level="warning", lifespan="off")
        uvicorn.Server(config).run(sockets=[bound])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
