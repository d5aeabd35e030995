"""The trainer's end of an engine's HTTP service, for everything but sampling (lrscale.rollout.vllm.dispatch)."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Engines speak plain HTTP, and to read the certificates of the world takes longer than an answer."""
HEALTH_S = 15.0
"""An engine that says nothing for so long counts as gone."""


class EngineError(RuntimeError):
    """An engine refused, failed, or cannot be reached."""


def health(url: str) -> dict[str, Any] | None:
    """What an engine says of itself, None where it says nothing."""
    try:
        return _get(url)
    except (httpx2.HTTPError, ValueError):
        return None


def lives(url: str) -> bool:
    """Whether an engine is there and has not failed."""
    said = health(url)
    return said is not None and said["state"] != "failed"


def _get(url: str) -> dict[str, Any]:
    with httpx2.Client(timeout=HEALTH_S, trust_env=False, verify=PLAIN) as client:
        answer = client.get(f"{url}/health")
        answer.raise_for_status()
        return dict(answer.json())


def ask(url: str, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Any:
    """POST; the JSON answer, or bytes where it is none.

    Raises:
        EngineError: it refused, with its own words, or gave no answer in time.
    """
    try:
        with httpx2.Client(timeout=timeout_s, trust_env=False, verify=PLAIN) as client:
            answer = client.post(f"{url}{path}", json=dict(body))
    except httpx2.TimeoutException as error:
        raise EngineError(f"{url}{path}: no answer within {timeout_s:g} s") from error
    except httpx2.HTTPError as error:
        raise EngineError(f"{url}{path}: {type(error).__name__}: {error}") from error
    if answer.status_code != 200:
        raise EngineError(f"{url}{path}: {_words(answer)}")
    return answer.content if answer.headers["content-type"] == "application/octet-stream" else answer.json()


def probe(url: str, prompts: Sequence[Sequence[int]], *, timeout_s: float) -> tuple[list[list[float]], int | None]:
    """Log-probs of the prompts' tokens, and the version they were computed with."""
    answer = ask(url, "/probe", {"prompts": [list(prompt) for prompt in prompts]}, timeout_s=timeout_s)
    return answer["logprobs"], answer["version"]


def _words(answer: httpx2.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.text[:300]}"
