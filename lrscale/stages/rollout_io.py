"""Rollouts and traces on disk: JSON lines for people and tools, safetensors for the numbers beside them.

Files are written under a temporary name and renamed when whole, so a file that is there is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lrscale.latent import LatentPolicy
from lrscale.records import LatentSpan, Prompt, Rollout, RolloutGroup, Score, Trace


class StateDamagedError(RuntimeError):
    """A file that this run wrote is not as it was left: no fault of the recipe, and nothing to guess at."""


def write_whole(path: Path, content: bytes) -> None:
    """Replace the file in one go: after a crash it holds the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def json_lines(objects: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in objects).encode()


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises StateDamagedError where it is no JSON (any more)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StateDamagedError(f"{path} is damaged ({error}); restore it, or start a new run") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """What `json_lines` made. Raises StateDamagedError where a line is no JSON (any more).

    Texts hold line ends of other kinds, at which `splitlines` would cut them.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise StateDamagedError(f"{path} is damaged ({error}); restore it, or start a new run") from error


def trace_to_json(trace: Trace) -> dict[str, Any]:
    return {
        "prompt_id": trace.prompt_id,
        "prompt_ids": list(trace.prompt_ids),
        "completion_ids": list(trace.completion_ids),
        "reward": trace.reward,
    }


def trace_from_json(entry: Mapping[str, Any]) -> Trace:
    return Trace(entry["prompt_id"], tuple(entry["prompt_ids"]), tuple(entry["completion_ids"]), entry["reward"])


def tokens_text(policy: LatentPolicy, ids: Sequence[int]) -> str:
    """What token ids say. Bytes are joined before they are read, so characters cut by a token's edge survive."""
    return b"".join(map(policy.detector.token_bytes, ids)).decode(errors="replace")


def segments(policy: LatentPolicy, rollout: Rollout) -> list[dict[str, Any]]:
    """The completion for readers: `{"text"}` and `{"latent_steps"}` in turns."""
    parts: list[dict[str, Any]] = []
    start = 0
    for span in rollout.latent_spans:
        stop = span.position + 1 - len(rollout.prompt_ids)
        if stop < 0 or not span.steps:
            continue  # a run inside the prompt
        if stop > start:
            parts.append({"text": tokens_text(policy, rollout.completion_ids[start:stop])})
        parts.append({"latent_steps": span.steps})
        start = max(stop, start)
    rest = tokens_text(policy, rollout.completion_ids[start:])
    return [*parts, {"text": rest}] if rest else parts


def shown(policy: LatentPolicy, prompt: Prompt, rollout: Rollout, reward: float | None) -> dict[str, Any]:
    """One rollout as the report shows it; reward null where scoring failed."""
    return {
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.text,
        "segments": segments(policy, rollout),
        "reward": reward,
        "tokens": len(rollout.completion_ids),
        "latent_steps": rollout.completion_latent_steps,
        "stop_reason": rollout.stop_reason,
    }


def save_groups(
    path: Path,
    groups_P: Sequence[RolloutGroup],
    policy: LatentPolicy,
    *,
    about: Mapping[str, Any],
    advantages_PG: Tensor | None = None,
) -> None:
    """Write PATH (.jsonl) and, beside it, .safetensors with log-probs and latents of all rows, joined in order.

    `about` goes into every line (arm, step, ...). `load_rollouts` gives back what can be replayed exactly.
    """
    lines: list[dict[str, Any]] = []
    rollouts: list[Rollout] = []
    for p, group in enumerate(groups_P):
        for g, (rollout, score) in enumerate(zip(group.rollouts, group.scores, strict=True)):
            right = isinstance(score, Score)
            line = {**about, **shown(policy, group.prompt, rollout, score.value if right else None)}
            line["parts" if right else "failed"] = dict(score.parts) if right else score.kind
            if advantages_PG is not None:
                line["advantage"] = float(advantages_PG[p, g])
            line["prompt_ids"] = list(rollout.prompt_ids)
            line["completion_ids"] = list(rollout.completion_ids)
            line["latent_spans"] = [list(span) for span in rollout.latent_spans]
            line["policy_version"] = rollout.policy_version
            lines.append(line)
            rollouts.append(rollout)
    # The numbers first: where the JSON lines are, the rest is there too.
    tensors = {
        "logprobs_T": torch.cat([rollout.logprobs_T for rollout in rollouts]),
        "latents_LH": torch.cat([rollout.latents_LH for rollout in rollouts]),
    }
    write_whole(path.with_suffix(".safetensors"), save({name: t.contiguous() for name, t in tensors.items()}))
    write_whole(path, json_lines(lines))


def load_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a file that `save_groups` wrote."""
    lines = read_json_lines(path)
    tensors = load_file(path.with_suffix(".safetensors"))
    spans = [tuple(LatentSpan(*span) for span in line["latent_spans"]) for line in lines]
    logprobs = tensors["logprobs_T"].split([len(line["completion_ids"]) for line in lines])
    latents = tensors["latents_LH"].split([sum(span.steps for span in row) for row in spans])
    return [
        Rollout(
            prompt_ids=tuple(line["prompt_ids"]),
            completion_ids=tuple(line["completion_ids"]),
            logprobs_T=logprobs_T,
            latent_spans=row_spans,
            latents_LH=latents_LH,
            policy_version=line["policy_version"],
            stop_reason=line["stop_reason"],
        )
        for line, row_spans, logprobs_T, latents_LH in zip(lines, spans, logprobs, latents, strict=True)
    ]
