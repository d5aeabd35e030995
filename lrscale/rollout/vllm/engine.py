"""Rollouts from vLLM engines, as a RolloutEngine: the same records as the local engine's.

    generate     rows --> engines (balanced) --> token ids, log-probs, latent spans --> Rollout
    load_weights full_parameters() --> publication --> engines --> probe
    complete     rollouts without latents --> one batched expand of the trainer (rollout.latents: recompute)

What sampling draws from: on a GPU every row has a seed of its own, made of the plan's seed and the row's key, so a row
is drawn again alike as far as the engine's arithmetic repeats. A CPU engine draws all rows from one generator (a seed a
row ends vLLM 0.32 there), so what a row gets depends on what is sampled beside it. The local engine alone repeats
tokens exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors.torch import load
from torch import Tensor

from lrscale.config.rollout import VllmRolloutConfig
from lrscale.latent import LatentPolicy
from lrscale.records import LatentSpan, Rollout
from lrscale.rollout.engine import SamplingPlan
from lrscale.rollout.vllm.client import EngineError
from lrscale.rollout.vllm.dispatch import Limits, Round, Row
from lrscale.rollout.vllm.publisher import Publisher
from lrscale.rollout.vllm.stream import prompt_positions, split

_REVIVALS = 3
"""How often within one set of prompts engines are brought up again when all of them have died."""
_SEED_BITS = (1 << 31) - 1


class Peers(Protocol):
    """The ranks of the trainer (lrscale.parallel.lockstep.Lockstep)."""

    def any(self, *, flag: bool) -> bool: ...

    def most(self, *counts: int) -> tuple[int, ...]: ...

    def tick(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Trainer:
    """The process that samples, among its peers."""

    peers: Peers
    rank: int = 0
    world_size: int = 1
    micro_batch_tokens: int = 8192
    """Positions of a batch in which latents are recomputed."""


class VllmRollouts:
    """See `lrscale.rollout.engine.RolloutEngine`. The ranks that share engines do so through the publisher's owner."""

    def __init__(
        self,
        policy: LatentPolicy,
        config: VllmRolloutConfig,
        publisher: Publisher,
        *,
        latent_token_id: int,
        trainer: Trainer,
    ) -> None:
        self.policy = policy
        self.config = config
        self.publisher = publisher
        self.latent_token_id = latent_token_id
        self._trainer = trainer
        self._peers = trainer.peers
        self._version = 0
        self.retried = 0
        """Rows that were handed out again since the start."""

    @property
    def version(self) -> int:
        return self._version

    def generate(
        self, prompts: Sequence[Sequence[int]], plan: SamplingPlan, *, row_keys: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Rollout]]:
        """ValueError for a mode that vLLM has not: it always takes the latent steps of a marker, and its own latents."""
        if plan.mode != "real":
            raise ValueError(
                f"rollout.kind vllm decodes with the policy's own latents (mode real), not with mode {plan.mode}: set "
                "rollout.kind: local, or rollout.other_modes: local, which leaves only such samples to the trainer"
            )
        keys = list(row_keys) if row_keys is not None else list(range(len(prompts)))
        found = [self.policy.detector.find(prompt) for prompt in prompts]
        waiting = [
            Row(place, prompt_positions(prompt, self.policy.detector, self.latent_token_id), row_seed(plan.seed, key))
            for place, (prompt, key) in enumerate(zip(prompts, keys, strict=True))
        ]
        sampling = self._sampling(plan)
        for revival in range(_REVIVALS + 1):
            urls = self.publisher.usable()
            round_ = Round(
                waiting, urls, sampling, self._limits(), self._peers.tick, self._trainer.rank % max(len(urls), 1)
            )
            for url, answer in round_:
                place = answer["key"]
                yield place, self._rollout(tuple(prompts[place]), found[place], url, answer)
            self.retried += round_.retried
            waiting = round_.left
            if not self._peers.any(flag=bool(waiting)):
                return
            if revival < _REVIVALS:
                self.publisher.revive(self._version)
        why = next((f" (the last: {row.why})" for row in waiting if row.why), "")
        raise EngineError(f"rollout engines died {_REVIVALS + 1} times within one set of prompts{why}; see their logs")

    def load_weights(
        self, parameters: Iterable[tuple[str, Tensor]], *, version: int, projector_only: bool = False
    ) -> None:
        """Publish. PublicationError where an engine has not exactly these weights afterwards."""
        self.publisher.publish(parameters, version=version, projector_only=projector_only)
        self._version = version

    def rest(self) -> None:
        self.publisher.sleep()

    def complete(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        if self.config.latents == "engine":
            return list(rollouts)
        from lrscale.rollout.vllm.recompute import recompute

        return recompute(
            self.policy,
            rollouts,
            self._peers,
            temperature=self.config.temperature,
            positions=self._trainer.micro_batch_tokens,
        )

    def close(self) -> None:
        self.publisher.close()

    def _limits(self) -> Limits:
        window = -(-2 * self.config.batch_rows // self._trainer.world_size)
        return Limits(self.config.request_timeout_s, window=max(window, 8))

    def _sampling(self, plan: SamplingPlan) -> dict[str, Any]:
        config = self.config
        return {
            "max_tokens": config.max_new_tokens,
            "min_tokens": config.min_new_tokens,
            "temperature": config.temperature if plan.temperature is None else plan.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "stop_token_ids": list(self.policy.stop_ids),
            "ignore_eos": True,  # the policy's own stop tokens are named, whatever the engine's config says
        }

    def _rollout(
        self, prompt: tuple[int, ...], found: Sequence[LatentSpan], url: str, answer: dict[str, Any]
    ) -> Rollout:
        """The record of an answer; its latents are the engine's, or still to be computed."""
        completion, logprobs, runs = split(answer["token_ids"], answer["logprobs"], self.latent_token_id)
        inside = [span for span in found if span.position < len(prompt) - 1]
        spans = (*inside, *(LatentSpan(len(prompt) + position, steps) for position, steps in runs))
        return Rollout(
            prompt_ids=prompt,
            completion_ids=tuple(completion),
            logprobs_T=torch.tensor(logprobs, dtype=torch.float32),
            latent_spans=spans,
            latents_LH=self._latents(url, answer["latents"], sum(span.steps for span in spans)),
            policy_version=answer["version_start"],
            stop_reason=answer["finish_reason"],
            version_end=answer["version_end"],
        )

    def _latents(self, url: str, payload: bytes | None, count: int) -> Tensor:
        if self.config.latents == "recompute" or not count:
            return torch.zeros(0, self.policy.backbone.hidden_size, dtype=self.policy.backbone.dtype)
        (latents_LH,) = load(payload).values() if payload else (torch.zeros(0),)
        if len(latents_LH) < count:
            raise EngineError(f"{url} returned {len(latents_LH)} latents for a sequence that has {count}")
        return latents_LH[:count].to(self.policy.backbone.dtype)  # a cut run may have computed one more


def row_seed(seed: int, key: int) -> int:
    """A seed for one row, far from those of its neighbours."""
    mixed = (seed * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (mixed ^ (mixed >> 31)) & _SEED_BITS
