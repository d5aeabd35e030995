"""Speed of `LatentPolicy.generate` against transformers' `generate`, and of decoding with markers against without.

Both sides sample the same number of positions with the same model, no stop token; positions a CPU second.
For the second comparison the head is made to write a marker of 3 steps every 24 positions in every row, or
letters only. `python -m benchmarks.decode` prints the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.models import random_policy
from lrscale.latent import LatentPolicy


class ScriptedHead:
    """Adds a bias that makes every row follow a script of tokens, whatever the model says."""

    def __init__(self, policy: LatentPolicy, script: list[int]) -> None:
        self._head, self._script, self._calls = policy.backbone.head, script, 0

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden)
        token = self._script[self._calls % len(self._script)]
        self._calls += 1
        logits[:, token] += 1e4
        return logits


def script(policy: LatentPolicy, *, markers: bool) -> list[int]:
    """24 positions: letters, or a marker of 3 latent steps (its steps take positions of the script too)."""
    letter = policy.tokenizer.convert_tokens_to_ids("x")
    marker = policy.marker_ids(3) if markers else []
    return [*marker, *[letter] * (24 - len(marker))]


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(first: Callable[[], object], second: Callable[[], object], runs: int) -> tuple[float, float, float]:
    """Medians of both, and the median of the ratios second/first taken pair by pair."""
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(runs)]
    ratio = statistics.median(b / a for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 128), ("prompt", 64), ("positions", 128), ("runs", 7), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = random_policy()
    prompts = torch.randint(60, 90, (options.rows, options.prompt), generator=torch.Generator().manual_seed(0))
    rows, made = prompts.tolist(), options.rows * options.positions
    config = GenerationConfig(
        max_new_tokens=options.positions, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0, use_cache=True
    )

    def ours() -> None:
        policy.generate(rows, max_new_tokens=options.positions, stop_ids=())

    def theirs() -> None:
        policy.model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)

    a, b, ratio = compare(ours, theirs, options.runs)
    print(
        f"{options.rows} rows, prompt {options.prompt}, {options.positions} new positions, {options.threads} thread(s)"
    )
    print(f"lrscale generate, no markers   {made / a:9.0f} positions a CPU second")
    print(f"transformers generate          {made / b:9.0f} positions a CPU second   ({ratio:.2f} x our time)")

    head = policy.backbone.head

    def scripted(*, markers: bool) -> None:
        policy.backbone.head = ScriptedHead(policy, script(policy, markers=markers))
        ours()
        policy.backbone.head = head

    a, b, ratio = compare(lambda: scripted(markers=False), lambda: scripted(markers=True), options.runs)
    print(f"scripted, letters only         {made / a:9.0f} positions a CPU second")
    print(f"scripted, markers of 3 steps   {made / b:9.0f} positions a CPU second   ({100 * (ratio - 1):+.1f} % time)")


if __name__ == "__main__":
    main()
