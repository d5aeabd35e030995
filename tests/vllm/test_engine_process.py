"""Engines as processes of their own: weights, samples, deaths. One engine for all of it, and the one that replaces it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from lrscale.config.optimisation import OptimisationConfig
from lrscale.config.recipe import Recipe
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.single import SingleEngine
from lrscale.rollout import weights
from lrscale.rollout.engine import SamplingPlan
from lrscale.rollout.vllm.client import EngineError, ask, health, probe
from lrscale.rollout.vllm.engine import VllmRollouts
from lrscale.rollout.vllm.transport import Broadcast, Transport
from lrscale.rollout.weight_files import Manifest, WrittenFiles, bucket_path
from lrscale.rollout.weights import PublicationError
from lrscale.stages.rollout_engines import vllm_rollouts
from tests.vllm.shared_memory import in_shared_memory, left_in_shared_memory
from tests.vllm.talkative_models import talkative_policy

pytestmark = pytest.mark.slow

RECIPE = {
    "model": {"device": "cpu"},
    "rollout": {
        "kind": "vllm",
        "max_new_tokens": 40,
        "enforce_eager": True,
        "batch_rows": 16,
        "max_model_len": 512,
        "latents": "engine",
    },
}
PROMPTS = 12


@dataclass
class Running:
    """A trainer of one process with its engine."""

    engine: SingleEngine
    rollouts: VllmRollouts
    broadcast: Broadcast
    """Beside the files that `rollouts` publishes by."""
    said: list[str]

    @property
    def url(self) -> str:
        (url,) = self.rollouts.publisher.usable()
        return url

    def prompts(self) -> list[list[int]]:
        policy = self.engine.policy
        return [
            [*policy.encode(f"row {i} "), *policy.marker_ids(1 + i % 3), *policy.encode("ab")] for i in range(PROMPTS)
        ]

    @contextmanager
    def publishing_by(self, transport: Transport) -> Iterator[None]:
        publisher = self.rollouts.publisher
        own, publisher.transport = publisher.transport, transport
        try:
            yield
        finally:
            publisher.transport = own

    def core(self) -> psutil.Process:
        """vLLM's process that has the model."""
        return next(p for p in self.below() if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline()))

    def below(self) -> list[psutil.Process]:
        return psutil.Process().children(recursive=True)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    shared = in_shared_memory()
    recipe = Recipe.model_validate(RECIPE)
    engine = SingleEngine(talkative_policy("llama"), OptimisationConfig(), ranks=Ranks())
    said: list[str] = []
    rollouts = vllm_rollouts(recipe, recipe.rollout, engine, tmp_path_factory.mktemp("run"), said.append)
    try:
        rollouts.load_weights(engine.full_parameters(), version=1)
        broadcast = Broadcast(
            rollouts.publisher.fleet, torch.device("cpu"), workers=1, limit_s=60, timeout_s=600, bucket_bytes=1 << 14
        )
        yield Running(engine, rollouts, broadcast, said)
        broadcast.close()
    finally:
        rollouts.close()
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before and p.status() != "zombie"]
    assert not [process for process in left if "tracker" not in " ".join(process.cmdline())]
    assert not left_in_shared_memory(shared)


def assert_as_local(running: Running) -> None:
    policy, prompts = running.engine.policy, running.prompts()
    rollouts = dict(running.rollouts.generate(prompts, SamplingPlan(seed=1, temperature=0.0)))
    local = dict(policy.iter_generate(prompts, max_new_tokens=40, temperature=0.0))
    assert rollouts.keys() == local.keys()
    for index, ours in local.items():
        theirs = rollouts[index]
        assert (theirs.completion_ids, theirs.latent_spans) == (ours.completion_ids, ours.latent_spans)
        assert (theirs.prompt_ids, theirs.stop_reason) == (ours.prompt_ids, ours.stop_reason)
        assert (theirs.logprobs_T - ours.logprobs_T).abs().max() < 1e-3
        assert theirs.latents_LH.shape == ours.latents_LH.shape
        assert torch.allclose(theirs.latents_LH, ours.latents_LH, atol=1e-3, rtol=1e-3)
        assert theirs.policy_version == theirs.version_end == running.rollouts.version
    assert sum(len(rollout.latents_LH) for rollout in local.values()) > PROMPTS


def scaled(running: Running, factor: float, *, projector: bool) -> None:
    """Other weights in the trainer."""
    part = running.engine.policy.projector if projector else running.engine.policy.model.base_model.layers
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(factor)


def test_samples_are_the_local_engines_and_follow_every_publication(running: Running):
    """Locks out stale weights, a projector that stays behind, and caches of old weights, none of which any error shows."""
    assert_as_local(running)
    scaled(running, 1.05, projector=False)
    running.rollouts.load_weights(running.engine.full_parameters(), version=2)
    assert_as_local(running)
    scaled(running, 0.9, projector=True)
    with pytest.raises(AssertionError):  # the control: without publication the engine's samples are others
        assert_as_local(running)
    running.rollouts.load_weights(running.engine.full_parameters("projector"), version=3, projector_only=True)
    assert_as_local(running)
    assert 0 <= running.rollouts.publisher.last_gap < 1e-3


def test_sampling_keeps_to_its_plan(running: Running):
    prompts = running.prompts()
    found = dict(running.rollouts.generate(prompts, SamplingPlan(seed=1)))
    assert sorted(found) == list(range(PROMPTS)) and all(0 < r.length <= 40 for r in found.values())
    assert len({rollout.completion_ids for rollout in found.values()}) > 3
    for mode in ("zero", "shuffled"):
        with pytest.raises(ValueError, match=r"rollout\.kind: local"):
            next(iter(running.rollouts.generate(prompts, SamplingPlan(seed=1, mode=mode))))


def test_wrong_weights_stop_the_run(running: Running, tmp_path: Path):
    """Locks out training on samples of weights that nobody trains: damaged, of another version, or other ones."""
    parameters = list(running.engine.full_parameters())
    files = WrittenFiles(tmp_path / "v9", version=9)
    for name, tensor in parameters:
        files.add(name, tensor)
    path = files.finish()
    with pytest.raises(EngineError, match="announced were version 8"):
        ask(running.url, "/weights", {"manifest": str(path), "version": 8}, timeout_s=120)
    bucket = bucket_path(tmp_path / "v9", Manifest.read(path).buckets[0])
    sound = bytearray(bucket.read_bytes())
    sound[-5] ^= 1
    bucket.write_bytes(sound)
    with pytest.raises(EngineError, match="arrived damaged"):
        ask(running.url, "/weights", {"manifest": str(path), "version": 9}, timeout_s=120)
    said = health(running.url)
    assert said is not None and (said["state"], said["version"]) == ("without weights", None)
    with pytest.raises(EngineError, match="without weights"):
        ask(running.url, "/generate", {"rows": [], "sampling": {}}, timeout_s=120)

    def others() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in parameters:
            yield name, tensor * 1.3 if name.endswith("layers.0.mlp.up_proj.weight") else tensor

    with pytest.raises(PublicationError, match=r"rollout\.probe_tolerance"):
        running.rollouts.load_weights(others(), version=4)
    running.rollouts.load_weights(running.engine.full_parameters(), version=4)
    assert_as_local(running)


def test_a_broadcast_brings_what_files_bring(running: Running, monkeypatch: pytest.MonkeyPatch):
    """Locks out weights that a broadcast mixes up, a projector that it leaves behind, and half a publication in use.

    A worker that finds damage stops the run, and the next publication is whole.
    """
    prompts = [[*prompt, 5, 6, 7] for prompt in running.prompts()]
    running.rollouts.load_weights(running.engine.full_parameters(), version=20)
    by_files = probe(running.url, prompts, timeout_s=120)[0]
    with running.publishing_by(running.broadcast):
        scaled(running, 1.05, projector=False)
        running.rollouts.load_weights(running.engine.full_parameters(), version=21)
        assert probe(running.url, prompts, timeout_s=120) != (by_files, 21)
        assert_as_local(running)
        scaled(running, 0.9, projector=True)
        running.rollouts.load_weights(running.engine.full_parameters("projector"), version=22, projector_only=True)
        assert_as_local(running)
        with monkeypatch.context() as patch, pytest.raises(PublicationError, match="arrived damaged") as caught:
            patch.setattr(weights, "checksum", lambda tensors: 1)
            running.rollouts.load_weights(running.engine.full_parameters(), version=23)
        assert running.url in str(caught.value) and "from 127.0.0.1:" in str(caught.value)
        assert (health(running.url) or {})["state"] == "without weights"
        running.rollouts.load_weights(running.engine.full_parameters(), version=24)
        by_broadcast = probe(running.url, prompts, timeout_s=120)[0]
        assert running.broadcast.groups_formed == 2
    running.rollouts.load_weights(running.engine.full_parameters(), version=25)
    assert probe(running.url, prompts, timeout_s=120)[0] == by_broadcast


def test_a_broadcast_to_an_engine_that_stands_still_ends(running: Running):
    """Locks out a trainer that waits for ever, an error that does not say for whom, and an engine lost for good."""
    impatient = Broadcast(running.rollouts.publisher.fleet, torch.device("cpu"), workers=1, limit_s=3, timeout_s=600)
    with running.publishing_by(impatient):
        running.rollouts.load_weights(running.engine.full_parameters(), version=30)
        core = running.core()
        core.suspend()
        try:
            with pytest.raises(PublicationError, match=running.url):
                running.rollouts.load_weights(running.engine.full_parameters(), version=31)
        finally:
            core.resume()
    with running.publishing_by(running.broadcast):
        running.rollouts.load_weights(running.engine.full_parameters(), version=32)
        assert_as_local(running)


def test_abort_and_drain(running: Running):
    """Locks out an abort that waits for the longest sequence, and a drain that loses or refuses what already runs."""
    policy = running.engine.policy
    row = {"key": 1, "prompt": policy.encode("abc"), "seed": 1}
    body = {"rows": [row], "sampling": {"max_tokens": 400, "ignore_eos": True}}
    answers: list[bytes] = []

    def ask_in_background() -> threading.Thread:
        def run() -> None:
            import httpx2

            answers.append(httpx2.post(f"{running.url}/generate", json=body, timeout=120, trust_env=False).content)

        thread = threading.Thread(target=run)
        thread.start()
        while (health(running.url) or {}).get("running") == 0 and thread.is_alive():
            time.sleep(0.005)
        return thread

    thread = ask_in_background()
    assert ask(running.url, "/abort", {}, timeout_s=60) == {"aborted": 1}
    thread.join()
    assert b'"finish_reason": "abort"' in answers[0]
    thread = ask_in_background()
    assert ask(running.url, "/drain", {}, timeout_s=120)["running"] == 0
    thread.join()
    assert b'"finish_reason": "length"' in answers[1]
    with pytest.raises(EngineError, match="draining"):
        ask(running.url, "/generate", body, timeout_s=60)
    assert ask(running.url, "/resume", {}, timeout_s=60)["state"] == "ready"


def test_an_engine_killed_in_mid_step_is_replaced_and_loses_nothing(running: Running):
    """Locks out missing and doubled samples, and an engine that comes back with the weights it was started with,
    or outside of the group that weights are broadcast in; and a trainer that waits for what a dead engine was asked.
    """
    scaled(running, 1.03, projector=False)
    running.rollouts.publisher.transport = running.broadcast
    running.rollouts.load_weights(running.engine.full_parameters(), version=5)
    formed = running.broadcast.groups_formed
    prompts = running.prompts() * 4
    seen: list[int] = []
    killed = ""
    for place, rollout in running.rollouts.generate(prompts, SamplingPlan(seed=2)):
        seen.append(place)
        assert rollout.policy_version == 5
        if not killed:
            killed = running.url
            running.core().kill()
            with pytest.raises(EngineError, match=r"^(?!.*no answer within)"):
                ask(killed, "/latents", {"requests": ["of a dead engine"]}, timeout_s=60)
    assert Counter(seen) == Counter(range(len(prompts)))
    assert running.url != killed and running.rollouts.retried
    assert any("starts anew" in line for line in running.said)
    assert_as_local(running)
    assert running.broadcast.groups_formed == formed + 1
