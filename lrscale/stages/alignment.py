"""An optional start for the projector: regression to what the replaced sentence would have put in.

A marker with N steps stands for a sentence; its tokens are cut into N nearly equal pieces, and the mean
embedding of piece i is the target of latent i. The hidden states that the projector reads come from a
teacher-forced forward in which the latents ARE those means, so that all pairs of a batch come from one
forward and the targets do not move while the projector learns.

    rows -> oracle latents -> replay -> (hidden state, mean embedding) pairs -> AdamW on the projector
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
    inputs_NH, targets_NH, names_N = collect_pairs(parts.policy, rows, budget)
    if len(inputs_NH) < 2:
        raise ValueError(
            f"alignment: {len(inputs_NH)} latent steps stand for sentences that are known, needed at least 2 to regress "
            "to (their variance is the measure). Sample more traces (stages.traces.prompts), or set "
            "stages.projector_sft.alignment.epochs: 0"
        )
    held_inputs_NH, held_targets_NH, _ = collect_pairs(parts.policy, heldout, budget)
    variance = targets_NH.float().var(dim=0).sum().clamp(min=torch.finfo(torch.float32).tiny)
    batches = -(-len(inputs_NH) // config.batch_pairs)
    total = config.epochs * batches
    with parts.log.progress("projector alignment", config.epochs, unit="epochs") as progress:
        for epoch in range(config.epochs):
            order = shuffled(range(len(inputs_NH)), parts.recipe.seed, "alignment", epoch)
            summed = 0.0
            for batch in range(batches):
                indices = order[batch * config.batch_pairs : (batch + 1) * config.batch_pairs]
                chosen = torch.tensor(indices).to(inputs_NH.device)
                rate = learning_rate_at(
                    SCHEDULE, peak=config.learning_rate, step=epoch * batches + batch, total_steps=total
                )
                try:
                    with parts.engine.training("projector"):
                        loss = _unexplained(parts.policy, inputs_NH[chosen], targets_NH[chosen], variance)
                        parts.engine.backward(loss)
                        parts.engine.step("projector", learning_rate=rate, max_grad_norm=MAX_GRAD_NORM)
                except NonFiniteError as error:
                    some = ", ".join(list(dict.fromkeys(names_N[index] for index in indices))[:3])
                    raise NonFiniteError(
                        f"projector alignment, step {epoch * batches + batch + 1} (epoch {epoch + 1}): {error} (prompts "
                        f"{some} ...). Lower stages.projector_sft.alignment.learning_rate, or use projector.kind: "
                        "normalised"
                    ) from error
                summed += float(loss.detach()) * len(chosen)
            line = {"stage": "alignment", "step": epoch + 1, "unexplained_variance_train": summed / len(order)}
            line["unexplained_variance"] = line["unexplained_variance_train"]
            if len(held_inputs_NH):
                with torch.no_grad():
                    held = _unexplained(parts.policy, held_inputs_NH, held_targets_NH, variance)
                line["unexplained_variance"] = float(held)
            line["pairs"] = len(order)
            parts.log.record(line)
            progress.advance(note=f"unexplained variance {line['unexplained_variance']:.3f}")
    parts.engine.reset_optimizer("projector")


class Pairs(NamedTuple):
    """What the projector learns from: N latent steps."""

    inputs_NH: Tensor
    """Hidden states that the projector reads."""
    targets_NH: Tensor
    """The mean embeddings it should give back."""
    prompt_ids_N: list[str]


@torch.no_grad()
def collect_pairs(policy: LatentPolicy, rows: Sequence[LiteRow], micro_batch_tokens: int) -> Pairs:
    """The pairs of all rows; those with a marker whose sentence is not known are left out."""
    known = [row for row in rows if all(row.replaced)]
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    names: list[str] = []
    for batch in micro_batches([row.positions for row in known], micro_batch_tokens):
        ids_BT, mask_BT = padded([known[index].ids for index in batch], policy.device)
        oracle = [oracle_latents(policy, known[index]) for index in batch]
        inputs += policy.projector_inputs(ids_BT, mask_BT, oracle)
        targets += oracle
        names += [known[index].prompt_id for index, means_LH in zip(batch, oracle, strict=True) for _ in means_LH]
    if not inputs:
        empty = torch.zeros(0, policy.backbone.hidden_size, device=policy.device)
        return Pairs(empty, empty, [])
    return Pairs(torch.cat(inputs), torch.cat(targets), names)


def oracle_latents(policy: LatentPolicy, row: LiteRow) -> Tensor:
    """[L, H] mean embeddings of the pieces of each replaced sentence, in the order of the row's latents."""
    means = []
    for span, sentence in zip(row.spans, row.replaced, strict=True):
        embeds_TH = policy.backbone.embed(torch.tensor(sentence, device=policy.device))
        means += [embeds_TH[start:stop].mean(0) for start, stop in pieces(len(sentence), span.steps)]
    return torch.stack(means)


def pieces(length: int, count: int) -> list[tuple[int, int]]:
    """`count` ranges that cut `length` tokens as evenly as whole tokens allow; ranges repeat where tokens are fewer."""
    return [
        (min(index * length // count, length - 1), max((index + 1) * length // count, index * length // count + 1))
        for index in range(count)
    ]


def _unexplained(policy: LatentPolicy, inputs_NH: Tensor, targets_NH: Tensor, variance: Tensor) -> Tensor:
    errors_NH = policy.projector(inputs_NH).float() - targets_NH.float()
    return errors_NH.square().sum(dim=1).mean() / variance
