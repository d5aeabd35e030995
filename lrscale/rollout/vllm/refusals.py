"""What the OpenAI-compatible server refuses: outputs bound to a form.

A grammar allows tokens, and a latent position is none: vLLM would forbid the policy's latent steps in the middle of a
run and go on with something else. ASGI middleware, given to vLLM's server by name (`--middleware`).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_Application = Callable[[_Message, _Receive, _Send], Awaitable[None]]


class RefuseForms:
    """Answers 400 to a request that wants its output in a form; everything else passes."""

    def __init__(self, app: _Application) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        key = form_wanted(b"".join(message.get("body", b"") for message in messages))
        if key is not None:
            await _refuse(send, key)
            return
        seen = iter(messages)

        async def again() -> _Message:
            message = next(seen, None)
            return await receive() if message is None else message

        await self._app(scope, again, send)


def form_wanted(body: bytes) -> str | None:
    """The key of a request that binds its output to a form, None where there is none."""
    try:
        request = json.loads(body)
    except ValueError:
        return None  # the server's own error is better
    if not isinstance(request, dict):
        return None
    for key, value in request.items():
        if key == "structured_outputs" or key.startswith("guided_"):
            bound = bool(value)
        elif key == "response_format":
            bound = isinstance(value, dict) and value.get("type") != "text"
        elif key == "text":  # of the API of responses
            form = value.get("format") if isinstance(value, dict) else None
            bound = isinstance(form, dict) and form.get("type") != "text"
        else:
            bound = key == "tool_choice" and value not in (None, "none", "auto")
        if bound:
            return key
    return None


async def _refuse(send: _Send, key: str) -> None:
    words = (
        f"{key} binds the output to a form, which does not go with latent steps: they are positions that no grammar "
        f"has. Leave {key} out and ask for the form in the prompt"
    )
    error = {"message": words, "type": "BadRequestError", "param": key, "code": 400}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
