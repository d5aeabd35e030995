"""The client's side of vLLM's tokens: prompts with latent positions in them, completions without."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrscale.latent import MarkerDetector
from lrscale.records import LatentSpan


def prompt_positions(prompt_ids: Sequence[int], detector: MarkerDetector, latent_token_id: int) -> list[int]:
    """The prompt as vLLM takes it: behind each marker its run of latent positions.

    A marker that ends the prompt has its run in the completion, as everywhere.
    """
    positions: list[int] = []
    start = 0
    for span in detector.find(prompt_ids):
        if span.position == len(prompt_ids) - 1:
            break
        positions += [*prompt_ids[start : span.position + 1], *[latent_token_id] * span.steps]
        start = span.position + 1
    return [*positions, *prompt_ids[start:]]


def split(
    token_ids: Sequence[int], logprobs: Sequence[float], latent_token_id: int
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[LatentSpan, ...]]:
    """Take a completion of vLLM apart: discrete tokens, their log-probs, and the runs of latent steps.

    A span's position is the index in the completion's discrete tokens of the token that its run follows, -1 for
    the prompt's last one; add the prompt's length for the spans of a `Rollout`. A run that a length limit cut holds
    the steps that were taken.

    Raises:
        ValueError: a log-prob is not finite; vLLM met a latent that it could not compute (latent_steps.py).
    """
    completion: list[int] = []
    kept: list[float] = []
    spans: list[LatentSpan] = []
    for token, logprob in zip(token_ids, logprobs, strict=True):
        if not math.isfinite(logprob):
            raise ValueError(f"vLLM gave the log-prob {logprob} to token {token}; generate this completion again")
        if token != latent_token_id:
            completion.append(token)
            kept.append(logprob)
        elif spans and spans[-1].position == len(completion) - 1:
            spans[-1] = spans[-1]._replace(steps=spans[-1].steps + 1)
        else:
            spans.append(LatentSpan(len(completion) - 1, 1))
    return tuple(completion), tuple(kept), tuple(spans)
