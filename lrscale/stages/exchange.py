"""Samples between ranks: rollouts and scores as bytes, without pickle.

After the exchange every rank holds all samples of a step, so advantages, metrics and decisions come out the
same everywhere, and any rank can train on any row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save

from lrscale.parallel.lockstep import Lockstep
from lrscale.records import LatentSpan, Rollout, Score, ScoreFailed


@dataclass(frozen=True, slots=True)
class Sample:
    """A rollout and what it scored."""

    rollout: Rollout
    score: Score | ScoreFailed | None
    """None: not scored yet, which only a kept rollout may be (lrscale.stages.pending)."""


def exchange(lockstep: Lockstep, mine: Mapping[int, Sample]) -> dict[int, Sample]:
    """All ranks' samples by their index in the whole step."""
    if lockstep.alone:
        return dict(mine)
    return {index: sample for part in lockstep.gather(to_bytes(mine)) for index, sample in from_bytes(part).items()}


def to_bytes(samples: Mapping[int, Sample]) -> bytes:
    """Numbers as safetensors, everything else as JSON beside them."""
    entries, tensors = [], {}
    for index, sample in samples.items():
        rollout = sample.rollout
        entries.append(
            {
                "index": index,
                "prompt_ids": rollout.prompt_ids,
                "completion_ids": rollout.completion_ids,
                "latent_spans": rollout.latent_spans,
                "policy_version": rollout.policy_version,
                "stop_reason": rollout.stop_reason,
                "version_end": rollout.version_end,
                "score": _score_to_json(sample.score),
            }
        )
        tensors[f"logprobs.{index}"] = rollout.logprobs_T.contiguous()
        tensors[f"latents.{index}"] = rollout.latents_LH.contiguous()
        if rollout.trainer_logprobs_T is not None:
            tensors[f"trainer.{index}"] = rollout.trainer_logprobs_T.contiguous()
    tensors["entries"] = torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)
    return save(tensors)


def from_bytes(payload: bytes) -> dict[int, Sample]:
    """What `to_bytes` wrote."""
    tensors = load(payload)
    entries: Sequence[dict[str, Any]] = json.loads(tensors["entries"].numpy().tobytes())
    return {
        entry["index"]: Sample(
            Rollout(
                prompt_ids=tuple(entry["prompt_ids"]),
                completion_ids=tuple(entry["completion_ids"]),
                logprobs_T=tensors[f"logprobs.{entry['index']}"],
                latent_spans=tuple(LatentSpan(*span) for span in entry["latent_spans"]),
                latents_LH=tensors[f"latents.{entry['index']}"],
                policy_version=entry["policy_version"],
                stop_reason=entry["stop_reason"],
                version_end=entry.get("version_end"),
                trainer_logprobs_T=tensors.get(f"trainer.{entry['index']}"),
            ),
            _score_from_json(entry["score"]),
        )
        for entry in entries
    }


def _score_to_json(score: Score | ScoreFailed | None) -> dict[str, Any] | None:
    if score is None:
        return None
    if isinstance(score, Score):
        return {"value": score.value, "parts": dict(score.parts)}
    return {"kind": score.kind, "detail": score.detail}


def _score_from_json(entry: Mapping[str, Any] | None) -> Score | ScoreFailed | None:
    if entry is None:
        return None
    if "value" in entry:
        return Score(entry["value"], entry["parts"])
    return ScoreFailed(entry["kind"], entry["detail"])
