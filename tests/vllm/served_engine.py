"""A policy in vLLM, in this process, and what is compared with the local engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from lrscale.latent import LatentPolicy
from lrscale.records import LatentSpan, Rollout
from lrscale.rollout.vllm.architectures import ARCHITECTURES
from lrscale.rollout.vllm.engine_options import EngineOptions
from lrscale.rollout.vllm.model_folder import prepare
from lrscale.rollout.vllm.stream import prompt_positions, split

WORKER = "lrscale.rollout.vllm.worker.LatentWorker"


@dataclass(frozen=True)
class Answer:
    """A completion as it came out of vLLM."""

    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[LatentSpan, ...]
    """Of the completion, positions counted from the prompt's start."""
    positions: int
    request_id: str
    text: str


@dataclass
class Served:
    """An engine around a policy."""

    policy: LatentPolicy
    llm: Any
    latent_token_id: int
    sampling: dict[str, Any] = field(default_factory=dict)

    def answers(self, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any) -> list[Answer]:
        """Greedy by default."""
        from vllm import SamplingParams

        stop_ids = list(self.policy.stop_ids)
        params = SamplingParams(
            **{"temperature": 0.0, "logprobs": 0, "stop_token_ids": stop_ids, "ignore_eos": True} | sampling,
            max_tokens=max_tokens,
        )
        detector = self.policy.detector
        texts = [{"prompt_token_ids": prompt_positions(prompt, detector, self.latent_token_id)} for prompt in prompts]
        outputs = self.llm.generate(texts, params, use_tqdm=False)
        return [self._answer(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def latents(self, answers: Sequence[Answer]) -> list[Tensor]:
        (path,) = self.llm.collective_rpc("take_latents", args=([answer.request_id for answer in answers],))
        tensors = load_file(path)
        Path(path).unlink()
        return [tensors[answer.request_id] for answer in answers]

    def reload(self, policy: LatentPolicy, *, projector_only: bool) -> None:
        """The policy's tensors by the trainer's names; vLLM's prefix cache behind it."""
        weights = [(f"reasoning_projector.{name}", tensor) for name, tensor in policy.projector.named_parameters()]
        if not projector_only:
            weights = [*policy.model.named_parameters(), *weights]
        self.llm.collective_rpc(lambda worker: worker.reload(iter(weights), projector_only=projector_only))
        assert self.llm.reset_prefix_cache()

    def _answer(self, prompt: Sequence[int], output: Any) -> Answer:
        (completion,) = output.outputs
        ids = list(completion.token_ids)
        logprobs = [entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=True)]
        assert all(
            logprob == 0.0 for token, logprob in zip(ids, logprobs, strict=True) if token == self.latent_token_id
        )
        discrete, kept, spans = split(ids, logprobs, self.latent_token_id)
        placed = tuple(LatentSpan(len(prompt) + span.position, span.steps) for span in spans)
        return Answer(discrete, kept, placed, len(ids), output.request_id, completion.text)


@contextmanager
def served(
    policy: LatentPolicy, folder: Path, options: EngineOptions | None = None, **arguments: Any
) -> Iterator[Served]:
    """An engine in this process, which takes seconds; given back at the end."""
    policy.save_pretrained(folder / "policy")
    model = prepare(folder / "policy", folder / "served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM, ModelRegistry
        from vllm.distributed import cleanup_dist_env_and_memory

        import lrscale.rollout.vllm.model as model_classes

        for name in ARCHITECTURES.values():  # by class: a name would cost one more process, which imports vLLM
            ModelRegistry.register_model(name, getattr(model_classes, name))
        defaults = {"num_gpu_blocks_override": 256, "max_model_len": 512, "max_num_seqs": 40, "block_size": 32}
        llm = LLM(
            str(model.path),
            dtype="float32",
            enforce_eager=True,
            worker_extension_cls=WORKER,
            additional_config=(options or EngineOptions()).additional_config(),
            **defaults | arguments,
        )
        try:
            llm.collective_rpc("check_latent_steps")
            yield Served(policy, llm, model.latent_token_id)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def assert_same(answers: Sequence[Answer], rollouts: Sequence[Rollout], *, logprob_gap: float = 1e-3) -> None:
    """Tokens, runs and log-probs of the completions are the local engine's."""
    for answer, rollout in zip(answers, rollouts, strict=True):
        last = len(rollout.prompt_ids) - 1
        assert answer.completion_ids == rollout.completion_ids
        assert answer.spans == tuple(span for span in rollout.latent_spans if span.position >= last)
        assert answer.positions == rollout.length
        gaps = [abs(a - b) for a, b in zip(answer.logprobs, rollout.logprobs_T.tolist(), strict=True)]
        assert max(gaps, default=0.0) < logprob_gap
