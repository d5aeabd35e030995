"""Rewards of services that refuse, stall, talk garbage, are busy, die and come back; and our own service."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lrscale.config.reward import HttpRewardConfig, PoolConfig
from lrscale.records import Prompt, Score, ScoreFailed
from lrscale.reward.build import Surroundings, limits_of
from lrscale.reward.limits import Limits
from lrscale.reward.pool import Pool
from lrscale.reward.remote import RemoteSpec
from lrscale.reward.source import Sample
from tests.unit.reward import services

ROOT = Path(__file__).parents[3]


@contextmanager
def remote(url: str, *, timeout_s: float = 30.0, **limits: Any) -> Iterator[Pool]:
    spec = RemoteSpec(url, timeout_s, limits.pop("token_file", ""))
    settings = {"workers": 2, "retries": 1, "backoff_s": 0.05, "timeout_s": 120.0, **limits}
    with closing(Pool(spec, Limits(**settings))) as pool:
        pool.needs()
        yield pool


def score(pool: Pool, *completions: str) -> list[Score | ScoreFailed]:
    for index, completion in enumerate(completions):
        pool.submit(index, Sample(Prompt(f"p{index}", "prompt ", {"answer": "x"}), completion, (1,)))
    assert pool.wait(120), "the pool hangs"
    found = pool.take()
    return [found[index] for index in range(len(completions))]


def test_the_contract_is_that_of_openrlhf() -> None:
    """Existing services must work as they are: these keys, these lists, nothing else."""
    seen = []

    def answer(handler, body) -> None:
        seen.append(body)
        services.lengths(handler, body)

    with services.service(answer) as url, remote(url, batch_size=3, max_wait_s=30.0) as pool:
        assert score(pool, "a", "bb", "") == [Score(1.0), Score(2.0), Score(0.0)]
    expected = {"query": ["prompt a", "prompt bb", "prompt "], "prompts": ["prompt "] * 3, "labels": ["x"] * 3}
    assert seen == [expected]


BAD_DAYS: dict[str, tuple[services.Answer, str, str]] = {
    "stalls": (services.stall, "timeout", "no whole answer within 8 s"),
    "trickles": (services.trickle, "timeout", "no whole answer within 8 s"),
    "hangs up": (services.hang_up, "unavailable", "RemoteProtocolError"),
    "html": (lambda h, b: services.reply(h, b"<html>busy</html>"), "invalid", "<html>busy"),
    "no rewards": (lambda h, b: services.reply(h, {"scores": [1]}), "invalid", "without `rewards`"),
    "a list": (lambda h, b: services.reply(h, [1.0]), "invalid", "without `rewards`"),
    "too many": (lambda h, b: services.reply(h, {"rewards": [1.0, 2.0]}), "invalid", "2 rewards for 1 samples"),
    "nan": (lambda h, b: services.reply(h, b'{"rewards": [NaN]}'), "invalid", "nan"),
    "null": (lambda h, b: services.reply(h, {"rewards": [None]}), "invalid", "None"),
    "text": (lambda h, b: services.reply(h, {"rewards": "1"}), "invalid", "str"),
    "not found": (lambda h, b: services.reply(h, {"error": "no such model"}, 404), "error", "404: .*no such model"),
    "broken": (lambda h, b: services.reply(h, {}, 500), "unavailable", "answered 500"),
    "moved": (lambda h, b: services.reply(h, {}, 302, Location="http://127.0.0.1:1/"), "error", "answered 302"),
    "fine": (services.lengths, "", ""),
}


def test_what_services_do_on_bad_days() -> None:
    """Each of these has been taken for a 0 by somebody."""

    def answer(handler, body) -> None:
        BAD_DAYS[body["query"][0].removeprefix("prompt ")][0](handler, body)

    with services.service(answer) as url, remote(url, timeout_s=8.0, workers=4) as pool:
        found = dict(zip(BAD_DAYS, score(pool, *BAD_DAYS), strict=True))
    assert found.pop("fine") == Score(4.0)
    for name, result in found.items():
        _, kind, words = BAD_DAYS[name]
        assert isinstance(result, ScoreFailed) and result.kind == kind, (name, result)
        assert re.search(words, result.detail), result.detail


def test_a_busy_service_is_asked_again_when_it_says_so() -> None:
    """429 with Retry-After: neither a failed score nor a hail of requests."""
    times: list[float] = []

    def answer(handler, body) -> None:
        import time

        times.append(time.monotonic())
        if len(times) == 1:
            services.reply(handler, {}, 429, Retry_After="1")
        else:
            services.lengths(handler, body)

    with services.service(answer) as url, remote(url, workers=1) as pool:
        assert score(pool, "abc") == [Score(3.0)]
        assert pool.take_stats().retries == 1
    assert times[1] - times[0] >= 1.0


def test_a_service_that_dies_and_comes_back_is_used_again() -> None:
    """A restart of the judge must cost neither samples nor the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/get_reward"
    with remote(url, retries=8, backoff_s=0.1) as pool:
        with services.service(services.lengths, port):
            assert score(pool, "a") == [Score(1.0)]
        back = threading.Event()
        pool.submit("later", Sample(Prompt("p", "prompt "), "four", (1,)))
        assert not pool.wait(0.5), "nobody is there"
        with services.service(services.lengths, port):
            back.set()
            assert pool.wait(60)
            assert pool.take() == {"later": Score(4.0)}
        assert pool.take_stats().retries >= 1


def test_nobody_there_is_unavailable_not_zero() -> None:
    with remote("http://127.0.0.1:9/get_reward") as pool:
        (result,) = score(pool, "a")
    assert isinstance(result, ScoreFailed) and result.kind == "unavailable" and "ConnectError" in result.detail


def test_the_token_goes_to_the_service_and_nowhere_else(tmp_path: Path) -> None:
    """It is named by its file: never in a recipe, a message or a command line."""
    (tmp_path / "token").write_text("s3cret\n")
    seen = []

    def answer(handler, body) -> None:
        seen.append(handler.headers["Authorization"])
        services.reply(handler, {"error": "who are you?"}, 401)

    with services.service(answer) as url, remote(url, token_file=str(tmp_path / "token")) as pool:
        (result,) = score(pool, "a")
    assert seen == ["Bearer s3cret"] and result.kind == "error" and "s3cret" not in result.detail


def test_limits_are_shared_over_ranks_and_outlast_the_client() -> None:
    """64 ranks that keep to the rate each are 64 times too fast; a pool that kills first never retries."""
    config = HttpRewardConfig(
        kind="http", url="http://x/", timeout_s=10, pool=PoolConfig(concurrency=8, rate_per_s=16.0)
    )
    limits = limits_of(config, world_size=4)
    assert (limits.concurrency, limits.rate_per_s) == (2, 4.0) and limits.timeout_s > 20
    assert Surroundings(Path()).world_size == 1


REWARD = """
import os, time
def reward(prompts, completions, answer):
    if completions[0] == "hang": time.sleep(1000)
    if completions[0] == "die": os._exit(1)
    if completions[0] == "bug": raise KeyError("bug")
    return [float(c == a) for c, a in zip(completions, answer)]
"""


def test_serve_reward_shares_a_function_under_the_contract(tmp_path: Path) -> None:
    """Several clients at once, samples that hang and die, and a Ctrl-C that leaves nothing behind."""
    (tmp_path / "reward.py").write_text(REWARD)
    command = [sys.executable, "-m", "lrscale.reward.server", str(tmp_path / "reward.py"), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--workers", "2", "--timeout-s", "4"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with remote(url, workers=2, batch_size=8) as pool:
            results = score(pool, "x", "hang", "y", "die", "x", "bug")
        shown = [result.value if isinstance(result, Score) else result.kind for result in results]
        assert shown == [1.0, "timeout", 0.0, "error", 1.0, "error"]
        assert "KeyError" in results[5].detail
        plain = httpx2.post(url, json={"query": ["px"], "prompts": ["p"], "labels": ["x"]})
        assert plain.json() == {"rewards": [1.0]}
        for body in ({"query": ["a"]}, {"query": ["a"], "prompts": ["b"], "labels": [1]}, [1]):
            refused = httpx2.post(url, json=body)
            assert refused.status_code == 422 and "error" in refused.json()
        assert httpx2.get(url.replace("/get_reward", "/health")).json() == {"ready": True}
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130)
        assert "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize(
    ("source", "code", "words"), [("def score(x): ...", 3, "exactly one of"), (None, 3, "cannot read")]
)
def test_serve_reward_says_what_is_wrong_with_a_file(tmp_path: Path, source: str | None, code: int, words: str) -> None:
    if source is not None:
        (tmp_path / "reward.py").write_text(source)
    command = [sys.executable, "-m", "lrscale.reward.server", str(tmp_path / "reward.py"), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, "") and words in done.stderr and "Traceback" not in done.stderr
