"""CPU seconds to get the log-probs of sequences with latents: lrscale's two ways against the reference's.

The reference expands one sequence at a time without a KV cache: for every latent one whole forward over
everything before it, then one more for the logits. `python -m benchmarks.latent_forward` prints the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.models import random_policy
from lrscale.latent import LatentPolicy


def sequences(
    policy: LatentPolicy, rows: int, positions: int, markers: int, steps: int, *, prompt_share: float
) -> tuple[Tensor, Tensor]:
    """Rows of random letters, `positions` long with their latents.

    The first `prompt_share` of a row stands for the prompt, which holds no markers; behind it they are at
    different places in every row. The later markers stand, the more the reference recomputes.
    """
    generator = torch.Generator().manual_seed(0)
    marker = policy.marker_ids(steps)
    length = positions - markers * steps
    letters = torch.randint(60, 90, (rows, length), generator=generator).tolist()
    for row in letters:
        first = int(length * prompt_share)
        spacing = (length - first) // (markers + 1)
        for index in range(markers):
            jitter = int(torch.randint(-spacing // 4, spacing // 4 + 1, (), generator=generator))
            start = first + (index + 1) * spacing + jitter
            row[start : start + len(marker)] = marker
    ids = torch.tensor(letters)
    return ids, torch.ones_like(ids)


@torch.no_grad()
def reference(policy: LatentPolicy, ids_BT: Tensor) -> list[Tensor]:
    """One sequence at a time, no cache, one forward a latent. Returns the log-probs [T] a row."""
    base, embed, head = policy.model.base_model, policy.model.get_input_embeddings(), policy.backbone.head
    logprobs = []
    for ids_T in ids_BT:
        embeds, start = embed(ids_T[:0]), 0
        read = []
        for span in policy.detector.find(ids_T.tolist()):
            embeds = torch.cat([embeds, embed(ids_T[start : span.position + 1])])
            read.extend(range(len(embeds) - (span.position + 1 - start), len(embeds) - 1))
            for _ in range(span.steps):
                hidden = base(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
                embeds = torch.cat([embeds, policy.projector(hidden[0, -1:])])
            read.append(len(embeds) - 1)
            start = span.position + 1
        embeds = torch.cat([embeds, embed(ids_T[start:])])
        read.extend(range(len(embeds) - (len(ids_T) - start), len(embeds)))
        hidden = base(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0, read]
        logprobs.append(head(hidden)[:-1].log_softmax(-1).gather(1, ids_T[1:, None]).squeeze(1))
    return logprobs


def cpu_seconds(work: Callable[[], object], runs: int) -> float:
    """Median CPU seconds of the process over `runs` runs after one that is not counted."""
    work()
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def parts(way: Callable[[slice], Tensor], ids: Tensor, rows: int) -> Callable[[], object]:
    """All sequences in micro-batches, as training does it: what fits the processor's caches runs faster."""
    return lambda: [way(slice(start, start + rows)) for start in range(0, len(ids), rows)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = {"rows": 64, "positions": 512, "markers": 4, "steps": 5, "runs": 5, "threads": 1}
    for name, default in (defaults | {"expand-rows": 64, "replay-rows": 8}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompt-share", type=float, default=0.5, help="share of a row in front of its markers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = random_policy()
    ids, mask = sequences(
        policy, options.rows, options.positions, options.markers, options.steps, prompt_share=options.prompt_share
    )
    expanded = policy.expand(ids, mask)

    def by_expand(part: slice) -> Tensor:
        out = policy.expand(ids[part], mask[part])
        return policy.token_logprobs(out.hidden_BTH, ids[part])[:, 1:]

    def by_replay(part: slice) -> Tensor:
        out = policy.replay(ids[part], mask[part], expanded.latents[part])
        return policy.token_logprobs(out.hidden_BTH, ids[part])[:, 1:]

    gap = max(
        (torch.stack(reference(policy, ids[:4])) - way(slice(0, 4))).abs().max().item()
        for way in (by_expand, by_replay)
    )
    ways = {
        "reference, one sequence at a time, no cache": (lambda: reference(policy, ids), max(1, options.runs // 2)),
        f"expand, {options.expand_rows} rows at a time": (parts(by_expand, ids, options.expand_rows), options.runs),
        f"replay, {options.replay_rows} rows at a time": (parts(by_replay, ids, options.replay_rows), options.runs),
    }
    print(
        f"{options.rows} sequences x {options.positions} positions, {options.markers} markers x {options.steps} steps "
        f"behind {options.prompt_share:.0%} of it, "
        f"{options.threads} thread(s), float32; log-probs agree to {gap:.1e}"
    )
    base = None
    for name, (work, runs) in ways.items():
        seconds = cpu_seconds(work, runs)
        base = base or seconds
        print(f"{name:45s} {seconds:8.3f} CPU-s   {base / seconds:6.1f} x")


if __name__ == "__main__":
    main()
