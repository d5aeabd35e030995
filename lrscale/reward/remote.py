"""Rewards of a service, under OpenRLHF's remote contract.

    POST url   {"query": [prompt + completion, ...], "prompts": [...], "labels": [the column `answer`, ...]}
    200        {"rewards": [number, ...]}

What may pass (no connection, a time-out, 408, 425, 429, 5xx) is tried again by the pool, after the service's own
Retry-After where it sends one. A null among the rewards is a sample that the service could not score;
`lrscale serve-reward` says why in `failures`: {"index": {"kind": ..., "detail": ...}}.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrscale.records import ScoreFailed
from lrscale.reward.functions import as_scores
from lrscale.reward.source import Needs, Passing, Result, Sample

if TYPE_CHECKING:
    import httpx2

_PASSING_STATUS = frozenset({408, 425, 429})
_SHOWN_CHARS = 300
_LARGEST_ANSWER = 64 << 20


@dataclass(frozen=True, slots=True)
class RemoteSpec:
    """Where the service is."""

    url: str
    timeout_s: float
    """Of one request, whatever it waits for."""
    token_file: str = ""
    """File with a bearer token; read in the worker, so it is on no command line and in no message."""

    def open(self) -> RemoteReward:
        import httpx2

        headers = {}
        if self.token_file:
            try:
                headers["Authorization"] = f"Bearer {Path(self.token_file).read_text(encoding='utf-8').strip()}"
            except OSError as error:
                raise ValueError(f"reward.token_file: cannot read {self.token_file} ({error.strerror})") from error
        # Redirects are not followed: a token must reach nobody but the service named.
        return RemoteReward(self, httpx2.Client(timeout=self.timeout_s, headers=headers, trust_env=False))


class RemoteReward:
    """A client of the service. It need not be up yet: the first samples find out."""

    def __init__(self, spec: RemoteSpec, client: httpx2.Client) -> None:
        self._spec = spec
        self._client = client

    def needs(self) -> Needs:
        return Needs()

    def score(self, samples: Sequence[Sample]) -> list[Result]:
        """One request for all samples."""
        import httpx2

        asked = {
            "query": [sample.prompt.text + sample.completion for sample in samples],
            "prompts": [sample.prompt.text for sample in samples],
            "labels": [sample.prompt.columns.get("answer") for sample in samples],
        }
        try:
            status, headers, body = self._post(asked)
        except (httpx2.TimeoutException, TimeoutError) as error:
            late = f"{self._spec.url}: no whole answer within {self._spec.timeout_s:g} s ({type(error).__name__})"
            return [Passing(ScoreFailed("timeout", late))] * len(samples)
        except httpx2.TransportError as error:
            gone = f"{self._spec.url}: {type(error).__name__}: {error}"
            return [Passing(ScoreFailed("unavailable", gone))] * len(samples)
        except ValueError as error:
            return [ScoreFailed("invalid", f"{self._spec.url}: {error}")] * len(samples)
        if status != 200:
            return [self._refused(status, headers, body)] * len(samples)
        return self._read(body, len(samples))

    def _post(self, asked: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and whole body. TimeoutError where a body that trickles in takes too long altogether."""
        deadline = time.monotonic() + self._spec.timeout_s
        body = bytearray()
        with self._client.stream("POST", self._spec.url, json=asked) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError
                if len(body) > _LARGEST_ANSWER:
                    raise ValueError(f"more than {_LARGEST_ANSWER >> 20} MiB for {len(asked['query'])} rewards")
            return response.status_code, response.headers, bytes(body)

    def _refused(self, status: int, headers: Mapping[str, str], body: bytes) -> Result:
        words = f"{self._spec.url} answered {status}: {body[:_SHOWN_CHARS].decode(errors='replace')}"
        if status in _PASSING_STATUS or status >= 500:
            return Passing(ScoreFailed("unavailable", words), _retry_after(headers))
        return ScoreFailed("error", words)

    def _read(self, body: bytes, count: int) -> list[Result]:
        try:
            answer = json.loads(body)
        except ValueError:
            shown = body[:_SHOWN_CHARS].decode(errors="replace")
            return [ScoreFailed("invalid", f"{self._spec.url} answered no JSON: {shown}")] * count
        if not isinstance(answer, Mapping) or "rewards" not in answer:
            shown = json.dumps(answer)[:_SHOWN_CHARS]
            return [ScoreFailed("invalid", f"{self._spec.url} answered without `rewards`: {shown}")] * count
        results: list[Result] = list(as_scores(answer["rewards"], count, form="trl"))
        failures = answer.get("failures")
        for index, failure in failures.items() if isinstance(failures, Mapping) else ():
            place = int(index) if str(index).isdigit() else -1
            if 0 <= place < count and not isinstance(failure, str) and answer["rewards"][place] is None:
                kind, detail = failure.get("kind"), str(failure.get("detail", ""))
                if kind in ("timeout", "error", "invalid", "unavailable"):
                    results[place] = ScoreFailed(kind, detail)
        return results


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds the service asks for; 0 where it does not say (the form with a date is not read)."""
    text = headers.get("retry-after", "")
    return float(text) if text.replace(".", "", 1).isdigit() else 0.0
