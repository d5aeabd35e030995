"""The HTTP service around an engine.

    GET  /health                                              state, version of the weights, requests that run
    POST /generate  {rows: [{key, prompt, seed}], sampling}   NDJSON, one line as each sequence finishes
    POST /probe     {prompts}                                 log-probs of given prompts
    POST /group     {address, port, ...}                      join the trainer's process group for weights
    POST /weights   {manifest, version, projector_only}       load a publication, from files or, with {group} in place
                                                              of {manifest}, as it is broadcast; {version} alone
                                                              renames what is there
    POST /latents   {requests}                                safetensors
    POST /abort     {requests}   POST /drain   POST /resume   POST /sleep {level}   POST /wake {tags}   POST /shutdown

409 with {"error": ...} where the engine refuses. It has no users of its own: it listens on 127.0.0.1, or on the
cluster's inner network where it is a role of a job.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from lrscale.rollout.vllm.desk import EngineDesk, Refused

if TYPE_CHECKING:
    from fastapi import FastAPI


def engine_app(desk: EngineDesk) -> FastAPI:
    """The application; one desk."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse

    app = FastAPI(title="lrscale rollouts", docs_url=None, redoc_url=None, openapi_url=None)

    def route(path: str, answer: Answer) -> None:
        async def handle(request: Request) -> Response:
            body = await request.body()
            try:
                result = await answer(desk, json.loads(body) if body else {})
            except Refused as refusal:
                return JSONResponse({"error": str(refusal)}, status_code=409)
            except (KeyError, TypeError, ValueError) as error:
                return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=422)
            if isinstance(result, bytes):
                return Response(result, media_type="application/octet-stream")
            if isinstance(result, AsyncIterator):
                return StreamingResponse(result, media_type="application/x-ndjson")
            return JSONResponse(result)

        # FastAPI reads annotations, which are texts in this file: it is told the types of a local name.
        handle.__annotations__ = {"request": Request, "return": Response}
        app.add_api_route(path, handle, methods=["POST"], response_model=None)

    for answer in _ANSWERS:
        route(f"/{answer.__name__}", answer)

    async def health() -> JSONResponse:
        return JSONResponse(desk.health())

    app.add_api_route("/health", health, methods=["GET"], response_model=None)
    return app


async def _lines(answers: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for answer in answers:
        yield json.dumps(answer).encode() + b"\n"


Answer = Callable[[EngineDesk, dict[str, Any]], Awaitable[Any]]


async def generate(desk: EngineDesk, body: dict[str, Any]) -> AsyncIterator[bytes]:
    if desk.state != "ready":  # before the status line is sent
        raise Refused(f"this engine is {desk.state}")
    return _lines(desk.generate(body["rows"], body["sampling"]))


async def group(desk: EngineDesk, body: dict[str, Any]) -> dict[str, Any]:
    return await desk.join_group(body)


async def weights(desk: EngineDesk, body: dict[str, Any]) -> dict[str, Any]:
    source = {key: str(body[key]) for key in ("manifest", "group") if key in body}
    if not source:
        return await desk.confirm_version(int(body["version"]))
    only = bool(body.get("projector_only", False))
    return await desk.take_weights(source, int(body["version"]), projector_only=only)


async def probe(desk: EngineDesk, body: dict[str, Any]) -> dict[str, Any]:
    return {"logprobs": await desk.probe(body["prompts"]), "version": desk.version}


async def latents(desk: EngineDesk, body: dict[str, Any]) -> bytes:
    return await desk.take_latents(body["requests"])


async def abort(desk: EngineDesk, body: dict[str, Any]) -> dict[str, int]:
    return {"aborted": await desk.abort(body.get("requests"))}


async def drain(desk: EngineDesk, body: dict[str, Any]) -> dict[str, Any]:
    await desk.drain()
    return desk.health()


async def resume(desk: EngineDesk, body: dict[str, Any]) -> dict[str, Any]:
    desk.resume()
    return desk.health()


async def sleep(desk: EngineDesk, body: dict[str, Any]) -> dict[str, bool]:
    return {"slept": await desk.sleep(int(body.get("level", 1)))}


async def wake(desk: EngineDesk, body: dict[str, Any]) -> dict[str, Any]:
    await desk.wake(body.get("tags", ()))
    return desk.health()


async def shutdown(desk: EngineDesk, body: dict[str, Any]) -> dict[str, Any]:
    desk.on_shutdown()
    return {}


_ANSWERS: tuple[Answer, ...] = (generate, group, weights, probe, latents, abort, drain, resume, sleep, wake, shutdown)
