"""vLLM against the local engine: the same tokens, runs, log-probs and latents, however vLLM cuts the work up."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` installs it")

from lrscale.latent import LatentPolicy, ReasoningProjector
from lrscale.records import Rollout
from lrscale.rollout.vllm.engine_options import EngineOptions
from lrscale.rollout.vllm.ragged_plan import RaggedPlan
from tests.vllm.served_engine import Served, assert_same, served
from tests.vllm.talkative_models import talkative_policy

NEW = 40
LONG = "Ann runs to the house. Bob sells a dog. "
PROMPTS = [
    "Story: Ann runs to the house. ",
    "Story: Bob",
    "Write <implicit_thought>2</implicit_thought> if you like. Story: Fay",
    "Dan paints a book. <implicit_thought>3</implicit_thought>",
    "Eve <implicit_thought>5</implicit_thought>",
    "Eve <implicit_thought>4</implicit_thought> and <implicit_thought>1</implicit_thought>",
    "Ann looks at a dog. <implicit_thought>1</implicit_thought>",
    "Ann looks at a dog. <implicit_thought>0</implicit_thought>",
    "Cat <implicit_thought>2</implicit_thought>",
    "def foo(x):",
    LONG * 3 + "<implicit_thought>3</implicit_thought>" + LONG,
]


@cache
def policy_of(architecture: str) -> LatentPolicy:
    kinds = {"llama": "normalised", "qwen2": "residual"}
    return talkative_policy(architecture, kinds.get(architecture, "paper"), layers=2)


def encoded(policy: LatentPolicy) -> list[list[int]]:
    return [policy.encode(prompt) for prompt in PROMPTS]


@cache
def reference(architecture: str) -> list[Rollout]:
    """What the local engine writes; the prompts are such that all numbers of steps occur, in runs of its own too."""
    policy = policy_of(architecture)
    rollouts = policy.generate(encoded(policy), max_new_tokens=NEW, temperature=0)
    own = Counter(
        span.steps for rollout in rollouts for span in rollout.latent_spans if span.position >= len(rollout.prompt_ids)
    )
    assert sum(own.values()) > 10, "the model writes no markers of its own"
    return rollouts


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "latents").mkdir()
    with served(policy_of("qwen3"), folder, EngineOptions(latents_folder=str(folder / "latents"))) as running:
        yield running


def test_alone_batched_shuffled_and_from_a_warm_cache(engine: Served) -> None:
    """Locks out sequences that see each other's automaton or latents, and latents lost in the prefix cache."""
    prompts, rollouts = encoded(engine.policy), reference("qwen3")
    alone = [answer for prompt in prompts for answer in engine.answers([prompt], NEW)]
    assert_same(alone, rollouts)
    assert engine.llm.reset_prefix_cache()
    for _ in ("cold", "warm"):
        assert_same(engine.answers(prompts, NEW), rollouts)
    order = list(range(len(prompts))) * 3
    random.Random(0).shuffle(order)
    assert_same(engine.answers([prompts[i] for i in order], NEW), [rollouts[i] for i in order])
    assert not any("implicit" in answer.text or "<|" in answer.text for answer in alone)


def continuations(rollouts: list[Rollout]) -> list[list[int]]:
    """Prompts that hold what was written so far, cut anywhere between tokens; many share their beginnings."""
    cuts = (5, 13, 14, 21, 27)
    return [[*rollout.prompt_ids, *rollout.completion_ids[:cut]] for rollout in rollouts for cut in cuts]


def test_latents_inside_the_prompt(engine: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks out latents computed from a block's old content where another request fills the block in the same step:
    simple batches never show it. The latents that come back are the local engine's too, also those of the prompt
    that were found in the cache.
    """
    prompts = continuations(reference("qwen3"))
    rollouts = engine.policy.generate(prompts, max_new_tokens=12, temperature=0)
    seen = Counter()
    make = RaggedPlan.make

    def spy(*arguments: object) -> RaggedPlan:
        plan = make(*arguments)
        seen["latents computed in the step itself"] += len(plan.rounds) > 0
        seen["sequences that read what another one writes"] += plan.shared > 0
        return plan

    monkeypatch.setattr(RaggedPlan, "make", spy)
    assert engine.llm.reset_prefix_cache()
    for _ in ("cold", "warm"):
        answers = engine.answers(prompts, 12)
        assert_same(answers, rollouts)
        for latents, rollout in zip(engine.latents(answers), rollouts, strict=True):
            torch.testing.assert_close(latents, rollout.latents_LH, rtol=0, atol=2e-3)
    assert all(
        seen[what] for what in ("latents computed in the step itself", "sequences that read what another one writes")
    )


def test_runs_cut_by_the_limit(engine: Served) -> None:
    """Locks out a last latent that is sampled but never computed, and spans that differ from the local engine's."""
    prompts = encoded(engine.policy)[3:7]
    cut = 0
    for limit in (1, 2, 3, 4, 9):
        rollouts = engine.policy.generate(prompts, max_new_tokens=limit, temperature=0)
        answers = engine.answers(prompts, limit)
        assert_same(answers, rollouts)
        for latents, rollout in zip(engine.latents(answers), rollouts, strict=True):
            torch.testing.assert_close(latents, rollout.latents_LH, rtol=0, atol=2e-3)
            cut += bool(rollout.latent_spans) and rollout.latent_spans[-1].position == (
                len(rollout.prompt_ids) + len(rollout.completion_ids) - 1
            )
    assert cut > 5


def test_sampled_logprobs_are_those_of_a_replay(engine: Served) -> None:
    """At temperature 1, latents taken from the engine: what importance ratios rest on. Minimum length and stop tokens too."""
    policy = engine.policy
    prompts = encoded(policy)
    answers = engine.answers(prompts, NEW, temperature=1.0, min_tokens=30)
    for prompt, answer, latents in zip(prompts, answers, engine.latents(answers), strict=True):
        assert 30 <= answer.positions <= NEW
        assert not set(answer.completion_ids[:-1]) & set(policy.stop_ids)
        ids = torch.tensor([[*prompt, *answer.completion_ids]])
        replayed = policy.replay(ids, torch.ones_like(ids), [latents])
        logprobs = policy.token_logprobs(replayed.hidden_BTH, ids)[0, len(prompt) :]
        torch.testing.assert_close(torch.tensor(answer.logprobs), logprobs, rtol=0, atol=1e-3)


def test_weights_change_in_the_running_engine(engine: Served) -> None:
    """Locks out a projector that does not matter (a control that must fail), and weights that are only half replaced."""
    policy, prompts, new = engine.policy, encoded(engine.policy), 16
    before = policy.generate(prompts, max_new_tokens=new, temperature=0)
    swapped = LatentPolicy(policy.model, policy.tokenizer, ReasoningProjector(list(policy.projector)[::-1]))
    engine.reload(swapped, projector_only=True)
    answers = engine.answers(prompts, new)
    assert_same(answers, swapped.generate(prompts, max_new_tokens=new, temperature=0))
    changed = [answer.completion_ids != rollout.completion_ids for answer, rollout in zip(answers, before, strict=True)]
    assert sum(changed) > len(changed) / 3, "another projector does not change what is written"
    other = talkative_policy("qwen3", "paper", layers=2, seed=3)
    engine.reload(other, projector_only=False)
    assert_same(engine.answers(prompts, new), other.generate(prompts, max_new_tokens=new, temperature=0))
    engine.reload(policy, projector_only=False)
    assert_same(engine.answers(prompts, new), before)
    with pytest.raises(Exception, match="none of the projector's tensors"):
        engine.llm.collective_rpc(
            lambda worker: worker.reload(iter([("lm_head.weight", torch.zeros(1))]), projector_only=True)
        )


def test_latents_that_are_not_there(engine: Served) -> None:
    with pytest.raises(Exception, match="never ran, or they were dropped"):
        engine.llm.collective_rpc("take_latents", args=(["no-such-request"],))


def test_chunked_prefill_and_preemption(tmp_path: Path) -> None:
    """Locks out latents lost where a prompt is cut anywhere, or where a sequence is thrown out and computed again."""
    policy, rollouts = policy_of("qwen3"), reference("qwen3")
    prompts = encoded(policy)
    limits = {"max_num_batched_tokens": 40, "num_gpu_blocks_override": 13, "max_model_len": 256}
    with served(policy, tmp_path, disable_log_stats=False, **limits) as engine:
        for _ in range(2):
            assert_same(engine.answers(prompts * 2, NEW), rollouts * 2)
        more = continuations(rollouts)
        assert_same(engine.answers(more, 12), policy.generate(more, max_new_tokens=12, temperature=0))
        preempted = [metric.value for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert preempted and preempted[0] > 5


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_other_architectures_decode_as_a_graph_would_record(architecture: str, tmp_path: Path) -> None:
    """Llama's and Mistral's way of loading, Qwen 2's biases, the normalised projector, the branch for CUDA graphs."""
    policy = policy_of(architecture)
    with served(policy, tmp_path, EngineOptions(fixed_decode=True)) as engine:
        for _ in ("cold", "warm"):
            assert_same(engine.answers(encoded(policy), NEW), reference(architecture))
