"""CPU seconds to get the log-probs of sequences with latents: lrscale's two ways against the reference's.

The reference expands one sequence at a time without a KV cache: for every latent one whole forward over
everything before it, then one more for the logits. Sequences are samples of prompts, `--group` each, as RL has them;
ours are measured as rows of their own and behind the prompt that they share.
`python -m benchmarks.latent_forward` prints the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.models import random_policy
from lrscale.latent import LatentPolicy
from lrscale.records import SharedPrefix


def sequences(  # noqa: PLR0913 - what the command line offers
    policy: LatentPolicy, rows: int, positions: int, markers: int, steps: int, *, prompt_share: float, group: int
) -> tuple[Tensor, int]:
    """Rows of random letters [rows, T], `positions` long with their latents, and the tokens of their prompts.

    The first `prompt_share` of a row is the prompt, which `group` rows have in common; behind it markers are at
    different places in every row. The later markers stand, the more the reference recomputes.
    """
    generator = torch.Generator().manual_seed(0)
    marker = policy.marker_ids(steps)
    length = positions - markers * steps
    letters = torch.randint(60, 90, (rows, length), generator=generator).tolist()
    first = int(length * prompt_share)
    for number, row in enumerate(letters):
        row[:first] = letters[number - number % group][:first]
        spacing = (length - first) // (markers + 1)
        for index in range(markers):
            jitter = int(torch.randint(-spacing // 4, spacing // 4 + 1, (), generator=generator))
            start = first + (index + 1) * spacing + jitter
            row[start : start + len(marker)] = marker
    return torch.tensor(letters), first


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


def behind_prompts(ids_BT: Tensor, cut: int) -> tuple[Tensor, SharedPrefix | None]:
    """Rows without their first `cut` tokens, and those, each prompt once."""
    return ids_BT[:, cut:], SharedPrefix.of([tuple(row) for row in ids_BT[:, :cut].tolist()]) if cut else None


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def parts(way: Callable[[slice], Tensor], ids: Tensor, rows: int) -> Callable[[], object]:
    """All sequences in micro-batches, as training does it: what fits the processor's caches runs faster."""
    return lambda: [way(slice(start, start + rows)) for start in range(0, len(ids), rows)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = {"rows": 64, "positions": 512, "markers": 4, "steps": 5, "runs": 5, "threads": 1}
    for name, default in (defaults | {"expand-rows": 32, "replay-rows": 16}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--group", type=int, default=16, help="samples of a prompt")
    parser.add_argument("--prompt-share", type=float, default=0.5, help="share of a row in front of its markers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = random_policy()
    ids, prompt = sequences(
        policy,
        options.rows,
        options.positions,
        options.markers,
        options.steps,
        prompt_share=options.prompt_share,
        group=options.group,
    )
    mask = torch.ones_like(ids)
    latents = policy.expand(ids, mask).latents

    def by_expand(part: slice, cut: int = 0) -> Tensor:
        own, prefix = behind_prompts(ids[part], cut)
        return policy.token_logprobs(policy.expand(own, torch.ones_like(own), prefix=prefix).hidden_BTH, own)[:, 1:]

    def by_replay(part: slice, cut: int = 0) -> Tensor:
        own, prefix = behind_prompts(ids[part], cut)
        out = policy.replay(own, torch.ones_like(own), latents[part], prefix=prefix)
        return policy.token_logprobs(out.hidden_BTH, own)[:, 1:]

    # The prompt's last token predicts the first of the completion, so it is every row's own.
    shared = max(0, prompt - 1)
    truth = torch.stack(reference(policy, ids[:4]))
    gap = max(
        (truth[:, cut:] - way(slice(0, 4), cut)).abs().max().item()
        for way in (by_expand, by_replay)
        for cut in (0, shared)
    )
    rows = {"expand": options.expand_rows, "replay": options.replay_rows}
    ways: dict[str, Callable[[], object]] = {
        "reference, one sequence at a time, no cache": lambda: reference(policy, ids)
    }
    for name, way in {"expand": by_expand, "replay": by_replay}.items():
        at_a_time = f"{rows[name]} rows at a time"
        ways[f"{name}, {at_a_time}"] = parts(way, ids, rows[name])
        ways[f"{name}, {at_a_time}, prompts shared"] = parts(partial(way, cut=shared), ids, rows[name])
    print(
        f"{options.rows} sequences x {options.positions} positions, {options.markers} markers x {options.steps} steps "
        f"behind a prompt of {prompt} tokens that {options.group} share, "
        f"{options.threads} thread(s), float32; log-probs agree to {gap:.1e}"
    )
    for work in list(ways.values())[1:]:
        work()  # not counted: the first call is slower
    seconds = [{name: cpu_seconds(work) for name, work in ways.items()} for _ in range(options.runs)]
    for name in ways:
        ratios = [next(iter(run.values())) / run[name] for run in seconds]
        took = statistics.median(run[name] for run in seconds)
        print(
            f"{name:48s} {took:8.3f} CPU-s   {statistics.median(ratios):6.1f} x   ({min(ratios):.1f} to {max(ratios):.1f})"
        )


if __name__ == "__main__":
    main()
