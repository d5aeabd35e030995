"""What the OpenAI-compatible server refuses before vLLM sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from lrscale.rollout.vllm.refusals import RefuseForms


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def answer(body: bytes, method: str = "POST") -> tuple[int, bytes]:
    """As a server does it, the body in two pieces."""
    pieces = iter([{"type": "http.request", "body": body[:5], "more_body": True}, {"body": body[5:]}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(pieces)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(RefuseForms(_echo)({"type": "http", "method": method}, receive, send))
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize(
    "bound",
    [
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"guided_regex": "a+"},
        {"text": {"format": {"type": "json_schema"}}},
        {"tool_choice": {"type": "function"}},
    ],
)
def test_a_form_is_refused_with_the_reason(bound: dict[str, Any]):
    """Locks out a grammar that silently cuts the policy's latent runs."""
    status, body = answer(json.dumps({"model": "m", **bound}).encode())
    assert status == 400
    assert next(iter(bound)) in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "response_format": {"type": "text"}, "tool_choice": "auto", "text": "words"}',
        b'{"guided_json": null}',
        b"no JSON at all",
        b"[1, 2, 3]",
    ],
)
def test_everything_else_passes_untouched(body: bytes):
    assert answer(body) == (200, body)
