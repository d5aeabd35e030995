"""An optional start for the projector: regression to what the replaced sentence would have put in.

A marker with N steps stands for a sentence; its tokens are cut into N nearly equal pieces, and the mean
embedding of piece i is the target of latent i. The hidden states that the projector reads come from a
teacher-forced forward in which the latents ARE those means, so that all pairs of a batch come from one
forward and the targets do not move while the projector learns.

    rows -> oracle latents -> replay -> (hidden state, mean embedding) pairs -> AdamW on the projector

At rollout the projector reads hidden states behind its own latents, errors and all. The own rounds show it those:
the pairs are collected anew with the latents of an expand, the targets stay (DAgger, arXiv 1011.0686).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrscale.config.optimisation import ScheduleConfig
from lrscale.latent import LatentPolicy
from lrscale.objective import learning_rate_at
from lrscale.parallel.engine import NonFiniteError
from lrscale.parallel.lockstep import ALONE, Lockstep
from lrscale.parallel.ranks import Ranks
from lrscale.report.timing import StageProgress
from lrscale.stages.batching import micro_batches, padded
from lrscale.stages.lite_rows import LiteRow
from lrscale.stages.parts import Parts
from lrscale.stages.randomness import shuffled

SCHEDULE = ScheduleConfig(kind="cosine", warmup_share=0.05, final_share=0.05)
MAX_GRAD_NORM = 1.0


def align_projector(parts: Parts, rows: Sequence[LiteRow], heldout: Sequence[LiteRow]) -> None:
    """Train the projector by regression; logs the share of the targets' variance that stays unexplained.

    The optimizer's moments are forgotten at the end: they belong to another loss.
    """
    config = parts.recipe.stages.projector_sft.alignment
    budget = parts.recipe.optimisation.micro_batch_tokens
    lockstep = parts.engine.lockstep
    rounds = 1 + config.own_rounds
    with parts.log.progress("projector alignment", config.epochs * rounds, unit="epochs") as progress:
        for number in range(rounds):
            pairs = collect_pairs(parts.policy, rows, budget, lockstep.ranks, own=number > 0)
            if pairs.total < 2:
                raise ValueError(
                    f"alignment: {pairs.total} latent steps stand for sentences that are known, needed at least 2 to "
                    "regress to (their variance is the measure). Sample more traces (stages.traces.prompts), or set "
                    "stages.projector_sft.alignment.epochs: 0"
                )
            held = collect_pairs(parts.policy, heldout, budget, lockstep.ranks, own=number > 0)
            _align_round(parts, pairs, held, number, progress)
    parts.engine.reset_optimizer("projector")


def _align_round(parts: Parts, pairs: Pairs, held: Pairs, number: int, progress: StageProgress) -> None:
    config = parts.recipe.stages.projector_sft.alignment
    engine, lockstep = parts.engine, parts.engine.lockstep
    variance = total_variance(pairs, lockstep).clamp(min=torch.finfo(torch.float32).tiny)
    batches = -(-pairs.total // config.batch_pairs)
    total = config.epochs * batches
    for epoch in range(config.epochs):
        order = shuffled(range(pairs.total), parts.recipe.seed, "alignment", number * config.epochs + epoch)
        summed = 0.0
        for batch in range(batches):
            indices = order[batch * config.batch_pairs : (batch + 1) * config.batch_pairs]
            rate = learning_rate_at(
                SCHEDULE, peak=config.learning_rate, step=epoch * batches + batch, total_steps=total
            )
            try:
                with engine.training("projector"):
                    loss = _unexplained(parts.policy, pairs, indices, variance)
                    engine.backward(loss)
                    engine.step("projector", learning_rate=rate, max_grad_norm=MAX_GRAD_NORM)
            except NonFiniteError as error:
                some = ", ".join(list(dict.fromkeys(pairs.prompt_ids_N[index] for index in indices))[:3])
                raise NonFiniteError(
                    f"projector alignment, step {epoch * batches + batch + 1} (epoch {epoch + 1}): {error} (prompts "
                    f"{some} ...). Lower stages.projector_sft.alignment.learning_rate, or use projector.kind: "
                    "normalised"
                ) from error
            summed += float(lockstep.sum(loss)) * len(indices)
        step = number * config.epochs + epoch + 1
        line = {"stage": "alignment", "step": step, "unexplained_variance_train": summed / len(order)}
        line["unexplained_variance"] = line["unexplained_variance_train"]
        if held.total:
            with torch.no_grad():
                unexplained = _unexplained(parts.policy, held, range(held.total), variance)
            line["unexplained_variance"] = float(lockstep.sum(unexplained))
        line["pairs"] = len(order)
        parts.log.record(line)
        progress.advance(note=f"unexplained variance {line['unexplained_variance']:.3f}")


class Pairs(NamedTuple):
    """What the projector learns from: N latent steps, of which this rank holds M."""

    inputs_MH: Tensor
    """Hidden states that the projector reads."""
    targets_MH: Tensor
    """The mean embeddings it should give back."""
    place: dict[int, int]
    """Where the pair of a number stands in the tensors; pairs of other ranks have no entry."""
    prompt_ids_N: list[str]

    @property
    def total(self) -> int:
        """N."""
        return len(self.prompt_ids_N)


@torch.no_grad()
def collect_pairs(
    policy: LatentPolicy,
    rows: Sequence[LiteRow],
    micro_batch_tokens: int,
    ranks: Ranks = ALONE.ranks,
    *,
    own: bool = False,
) -> Pairs:
    """The pairs of all rows, each held by one rank; rows with a marker whose sentence is not known are left out.

    `own`: the hidden states are those behind the policy's own latents, the targets the same.
    """
    known = [row for row in rows if all(row.replaced)]
    batches = micro_batches([row.positions for row in known], micro_batch_tokens)
    empty_MH = torch.zeros(0, policy.backbone.hidden_size, dtype=policy.backbone.dtype, device=policy.device)
    inputs, targets = [empty_MH], [empty_MH]
    place: dict[int, int] = {}
    names: list[str] = []
    for number in range(-(-len(batches) // ranks.world_size) * ranks.world_size):
        batch = [known[index] for index in batches[number]] if number < len(batches) else []
        pair_names = [row.prompt_id for row in batch for span in row.spans for _ in range(span.steps)]
        if number % ranks.world_size == ranks.rank:
            # A rank without a batch runs another's: all ranks run as many forwards.
            run = batch or [known[index] for index in batches[0]]
            ids_BT, mask_BT = padded([row.ids for row in run], policy.device)
            oracle = oracle_latents(policy, run)
            latents = policy.expand(ids_BT, mask_BT).latents if own else oracle
            hidden = policy.projector_inputs(ids_BT, mask_BT, latents)
            if batch:
                inputs += hidden
                targets += oracle
                place |= {len(names) + offset: len(place) + offset for offset in range(len(pair_names))}
        names += pair_names
    return Pairs(torch.cat(inputs), torch.cat(targets), place, names)


def oracle_latents(policy: LatentPolicy, rows: Sequence[LiteRow]) -> list[Tensor]:
    """[L, H] a row: mean embeddings of the pieces of each replaced sentence, in the order of the row's latents."""
    sentences = [sentence for row in rows for sentence in row.replaced]
    embeds = policy.backbone.embed(
        torch.tensor([token for sentence in sentences for token in sentence]).to(policy.device)
    )
    embeds_of = iter(embeds.split([len(sentence) for sentence in sentences]))
    means = []
    for row in rows:
        cut = [
            (next(embeds_of), pieces(len(sentence), span.steps))
            for span, sentence in zip(row.spans, row.replaced, strict=True)
        ]
        means.append(torch.stack([embeds_TH[start:stop].mean(0) for embeds_TH, parts in cut for start, stop in parts]))
    return means


def total_variance(pairs: Pairs, lockstep: Lockstep) -> Tensor:
    """Summed over the dimensions, of the targets on all ranks."""
    if lockstep.alone:
        return pairs.targets_MH.float().var(dim=0).sum()
    targets_MH = pairs.targets_MH.double()
    mean_H = lockstep.sum(targets_MH.sum(dim=0)) / pairs.total
    return (lockstep.sum((targets_MH - mean_H).square().sum()) / (pairs.total - 1)).float()


def pieces(length: int, count: int) -> list[tuple[int, int]]:
    """`count` ranges that cut `length` tokens as evenly as whole tokens allow; ranges repeat where tokens are fewer."""
    return [
        (min(index * length // count, length - 1), max((index + 1) * length // count, index * length // count + 1))
        for index in range(count)
    ]


def _unexplained(policy: LatentPolicy, pairs: Pairs, numbers: Sequence[int], variance: Tensor) -> Tensor:
    """This rank's part of the share of the variance that stays unexplained over the pairs of these numbers."""
    mine = torch.tensor([pairs.place[number] for number in numbers if number in pairs.place], dtype=torch.long)
    mine = mine.to(pairs.inputs_MH.device)
    errors_BH = policy.projector(pairs.inputs_MH[mine]).float() - pairs.targets_MH[mine].float()
    return errors_BH.square().sum(dim=1).sum() / len(numbers) / variance
