"""The policy update: recorded rollouts to optimizer steps on the base.

    groups, advantages -> rows -> minibatches (one optimizer step each) -> micro-batches -> replay -> clipped loss

Every rank holds all rows and works on its micro-batches of them, as many as the others.

Recorded latents are replayed as constants (method, section 5). Rows without a gradient (advantage 0 and
no KL term) are not run through the model; their tokens still count in the normaliser, so leaving them out
changes nothing but the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import torch
from safetensors.torch import load, save
from torch import Tensor

from lrscale.config.optimisation import SHARING_GAIN
from lrscale.config.stages import RlConfig
from lrscale.latent import LatentMode, LatentPolicy
from lrscale.objective import PolicyLoss, PolicyObjective, PolicyStats, loss_normaliser, policy_loss
from lrscale.parallel.engine import Engine, NonFiniteError
from lrscale.parallel.lockstep import Lockstep
from lrscale.records import Rollout, RolloutGroup, Score, SharedPrefix, TrainBatch
from lrscale.stages.batching import micro_batches, padded, positions_run, rounds
from lrscale.stages.randomness import shuffled


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """Everything but the data that decides an update."""

    rl: RlConfig
    mode: LatentMode
    temperature: float
    """The rollout's: log-probs are taken at it, or the ratio would not be that of the sampling policy."""
    max_new_tokens: int
    micro_batch_tokens: int
    seed: int
    share_prompts: bool = False
    """A prompt is run once for its samples in a micro-batch, where that is worth it."""

    @property
    def replay_mode(self) -> LatentMode:
        """Shuffled latents were recorded as they were used, so replaying them needs no shuffling."""
        return "zero" if self.mode == "zero" else "real"


@dataclass(frozen=True, slots=True)
class Row:
    """A scored sample of the update."""

    name: str
    """Prompt and sample, for error messages."""
    rollout: Rollout
    advantage: float
    old_T: Tensor | None = None
    """[T] recomputed log-probs of the completion, where the recipe asks for them."""
    reference_T: Tensor | None = None

    @property
    def positions(self) -> int:
        return len(self.rollout.prompt_ids) + len(self.rollout.completion_ids) + len(self.rollout.latents_LH)

    @property
    def shareable_ids(self) -> tuple[int, ...]:
        """What other samples of the prompt can share: all of it but the last token, which predicts the completion's
        first. Nothing where a marker ends inside: the latents behind it are this sample's own."""
        prompt = self.rollout.prompt_ids[:-1]
        return () if any(span.position < len(prompt) for span in self.rollout.latent_spans) else prompt


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What the optimizer steps of one RL step came to; means over them.

    `clip_share`, `kl`, `correction_mean` and the gap are over the tokens of rows with a gradient: the others are
    not run through the model.
    """

    loss: float
    grad_norm: float
    clip_share: float
    kl: float
    correction_mean: float
    """Mean importance weight; 1 where the correction is off."""
    logprob_gap_mean: float
    """|trainer - rollout| over the tokens of the first optimizer step, before any weight had moved."""
    logprob_gap_max: float
    optimizer_steps: int = 0
    """0 where no row carried a gradient: the weights are those of before."""


def update_policy(
    engine: Engine,
    rows: Sequence[Row],
    settings: UpdateSettings,
    *,
    step: int,
    learning_rate: float,
    reference: LatentPolicy | None = None,
) -> UpdateResult:
    """`passes` x `minibatches` optimizer steps on the base.

    Raises:
        NonFiniteError: a loss or gradient is not finite; names step and samples, no weight of that
            optimizer step has moved.
    """
    config = settings.rl
    live = [index for index, row in enumerate(rows) if has_gradient(row, config)]
    settings = replace(settings, share_prompts=worth_sharing([rows[index] for index in live], settings))
    rows = _with_fixed_logprobs(engine, rows, live, settings, reference)
    objective = PolicyObjective.from_config(config)
    losses: list[float] = []
    norms: list[float] = []
    stats: list[PolicyStats] = []
    gap: PolicyStats | None = None
    for sweep in range(config.passes):
        for part in minibatches(rows, config.minibatches, settings.seed, step, sweep):
            with engine.training("base"):
                summed, part_stats = _accumulate(engine, part, objective, settings, step)
                if part_stats is None:
                    continue  # no row of it carries a gradient: momentum alone must not move the weights
                try:
                    norms.append(engine.step("base", learning_rate=learning_rate, max_grad_norm=config.max_grad_norm))
                except NonFiniteError as error:
                    raise NonFiniteError(f"RL step {step}: {error}; samples {_some(part)}") from error
            losses.append(summed)
            stats.append(part_stats)
            gap = gap or part_stats
    total = sum(stats[1:], start=stats[0]) if stats else None
    return UpdateResult(
        loss=sum(losses) / max(len(losses), 1),
        grad_norm=sum(norms) / max(len(norms), 1),
        clip_share=total.clip_share if total else 0.0,
        kl=total.kl if total else 0.0,
        correction_mean=total.correction_mean if total else 1.0,
        logprob_gap_mean=gap.logprob_gap_mean if gap else 0.0,
        logprob_gap_max=gap.logprob_gap_max if gap else 0.0,
        optimizer_steps=len(stats),
    )


def has_gradient(row: Row, config: RlConfig) -> bool:
    """Whether the row's loss depends on the weights."""
    return row.advantage != 0.0 or config.kl.coefficient > 0


def scored_rows(groups_P: Sequence[RolloutGroup], advantages_PG: Tensor) -> list[Row]:
    """The samples that have a score; failed ones carry no loss and count in no normaliser."""
    return [
        Row(f"{group.prompt.prompt_id}/{g}", rollout, float(advantages_PG[p, g]))
        for p, group in enumerate(groups_P)
        for g, (rollout, score) in enumerate(zip(group.rollouts, group.scores, strict=True))
        if isinstance(score, Score)
    ]


def minibatches(rows: Sequence[Row], count: int, seed: int, step: int, sweep: int) -> list[list[Row]]:
    """All rows in `count` nearly equal parts, drawn anew for each pass; parts that would be empty are left out."""
    order = list(rows) if count == 1 else shuffled(rows, seed, "minibatch", step, sweep)
    cuts = [len(order) * index // count for index in range(count + 1)]
    return [order[start:stop] for start, stop in pairwise(cuts) if stop > start]


def pack(rows: Sequence[Row], device: torch.device, *, share_prompts: bool = False) -> TrainBatch:
    """Rows to one right-padded batch, behind what they share of their prompts."""
    prefix = SharedPrefix.of([row.shareable_ids for row in rows]) if share_prompts else None
    skipped_B = prefix.lengths_B if prefix else [0] * len(rows)
    own = [
        (*row.rollout.prompt_ids[skipped:], *row.rollout.completion_ids)
        for row, skipped in zip(rows, skipped_B, strict=True)
    ]
    ids_BT, mask_BT = padded(own, device)
    action_BT = _completion_columns([torch.ones(len(row.rollout.completion_ids)) for row in rows], mask_BT)
    return TrainBatch(
        input_ids_BT=ids_BT,
        attention_mask_BT=mask_BT,
        action_mask_BT=action_BT,
        old_logprobs_BT=_completion_columns([row.rollout.logprobs_T for row in rows], mask_BT),
        advantages_B=torch.tensor([row.advantage for row in rows], dtype=torch.float64, device=device),
        latents=tuple(row.rollout.latents_LH.to(device) for row in rows),
        prefix=prefix,
    )


def worth_sharing(rows: Sequence[Row], settings: UpdateSettings) -> bool:
    """Whether it is worth it to run the rows' prompts once for their samples.

    Decided once an update: the log-probs that stay fixed and those of the policy are to be rounded alike.
    """
    if not settings.share_prompts:
        return False
    budget, lengths = settings.micro_batch_tokens, [row.positions for row in rows]
    own, prefixes = _split(rows)
    together = positions_run(micro_batches(own, budget, prefixes=prefixes), own, prefixes)
    return together <= SHARING_GAIN * positions_run(micro_batches(lengths, budget), lengths)


def micro_batch_rounds(rows: Sequence[Row], settings: UpdateSettings, ranks: int) -> list[list[list[int]]]:
    """Which rows each of `ranks` runs together, a list a round. Prompts are shared by one rank alone."""
    if not settings.share_prompts:
        return rounds([row.positions for row in rows], settings.micro_batch_tokens, ranks)
    own, prefixes = _split(rows)
    return [[batch] for batch in micro_batches(own, settings.micro_batch_tokens, prefixes=prefixes)]


def _split(rows: Sequence[Row]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Each row's own positions, and what it can share."""
    prefixes = [row.shareable_ids for row in rows]
    return [row.positions - len(prefix) for row, prefix in zip(rows, prefixes, strict=True)], prefixes


def replay_logprobs(policy: LatentPolicy, batch: TrainBatch, settings: UpdateSettings) -> Tensor:
    """[B, T] log-probs of the actions given the recorded latents; 0 elsewhere."""
    out = policy.replay(batch.input_ids_BT, batch.attention_mask_BT, batch.latents, settings.replay_mode, batch.prefix)
    return policy.token_logprobs(
        out.hidden_BTH, batch.input_ids_BT, settings.temperature, where_BT=batch.action_mask_BT
    )


def _accumulate(
    engine: Engine, part: Sequence[Row], objective: PolicyObjective, settings: UpdateSettings, step: int
) -> tuple[float, PolicyStats | None]:
    """Gradients of one optimizer step, within `engine.training`. The normaliser counts every row of the part, skipped ones too."""
    config = settings.rl
    normaliser = loss_normaliser(
        config.advantage,
        action_tokens=sum(len(row.rollout.completion_ids) for row in part),
        sequences=len(part),
        max_new_tokens=settings.max_new_tokens,
    )
    live = [row for row in part if has_gradient(row, config)]
    summed, stats = torch.zeros((), dtype=torch.float64), PolicyStats.zero(engine.device)
    todo = micro_batch_rounds(live, settings, engine.ranks.world_size)
    for number, of_ranks in enumerate(todo, start=1):
        rows = [live[index] for index in of_ranks[engine.ranks.rank]] or [_padding(part[0])]
        batch = pack(rows, engine.device, share_prompts=settings.share_prompts)
        result = _loss_of(engine, rows, batch, objective, settings, normaliser, step)
        summed += result.loss.detach().double().cpu()
        stats += result.stats
        engine.backward(result.loss, last=number == len(todo))
    if not todo:
        return 0.0, None
    return float(engine.sum_over_ranks(summed)), _over_ranks(stats, engine.lockstep)


def _over_ranks(stats: PolicyStats, lockstep: Lockstep) -> PolicyStats:
    """The sums of all ranks' micro-batches."""
    parts = lockstep.gather_json({name: float(value) for name, value in asdict(stats).items()})
    return sum(
        (
            PolicyStats(**{name: torch.tensor(value, dtype=torch.float64) for name, value in part.items()})
            for part in parts
        ),
        start=PolicyStats.zero(torch.device("cpu")),
    )


def _loss_of(  # noqa: PLR0913 - one micro-batch, and what all of them have in common
    engine: Engine,
    rows: Sequence[Row],
    batch: TrainBatch,
    objective: PolicyObjective,
    settings: UpdateSettings,
    normaliser: float,
    step: int,
) -> PolicyLoss:
    logprobs_BT = replay_logprobs(engine.policy, batch, settings)
    result = policy_loss(
        logprobs_BT,
        batch,
        objective,
        normaliser=normaliser,
        recomputed_BT=_optional_columns([row.old_T for row in rows], batch),
        reference_BT=_optional_columns([row.reference_T for row in rows], batch),
    )
    words = None
    if not bool(torch.isfinite(result.loss)):
        bad = [row for row, sums in zip(rows, logprobs_BT.sum(1), strict=True) if not bool(sums.isfinite())]
        words = (
            f"RL step {step}: loss is {float(result.loss.detach())}; samples {_some(bad or rows)}. "
            "Lower the learning rate or max_grad_norm"
        )
    engine.refuse(words)
    return result


def _padding(like: Row) -> Row:
    """A row without a loss, for a rank that has no row of its own in a round."""
    rollout = replace(
        like.rollout,
        prompt_ids=like.rollout.prompt_ids[:1],
        completion_ids=(),
        logprobs_T=like.rollout.logprobs_T[:0],
        latent_spans=(),
        latents_LH=like.rollout.latents_LH[:0],
    )
    return Row("padding", rollout, 0.0, like.rollout.logprobs_T[:0], like.rollout.logprobs_T[:0])


@torch.no_grad()
def _with_fixed_logprobs(
    engine: Engine,
    rows: Sequence[Row],
    live: Sequence[int],
    settings: UpdateSettings,
    reference: LatentPolicy | None,
) -> list[Row]:
    """Rows with the log-probs that stay fixed during the update: recomputed old ones, the reference's."""
    done = list(rows)
    known = [rows[index].rollout.trainer_logprobs_T for index in live]
    if settings.rl.importance.old_logprobs == "recomputed" and all(values_T is not None for values_T in known):
        # The pass that made the latents has them, with the weights that these rows were sampled with.
        for index, values_T in zip(live, known, strict=True):
            done[index] = replace(done[index], old_T=values_T)
    elif settings.rl.importance.old_logprobs == "recomputed":
        for index, values_T in _fixed_logprobs(engine.policy, engine.lockstep, rows, live, settings):
            done[index] = replace(done[index], old_T=values_T)
    if reference is not None:
        for index, values_T in _fixed_logprobs(reference, engine.lockstep, rows, live, settings):
            done[index] = replace(done[index], reference_T=values_T)
    return done


def _fixed_logprobs(
    policy: LatentPolicy, lockstep: Lockstep, rows: Sequence[Row], live: Sequence[int], settings: UpdateSettings
) -> Iterable[tuple[int, Tensor]]:
    """[T] log-probs of each live row's completion, worked out by one rank and told to all."""
    mine: dict[str, Tensor] = {}
    ranks = lockstep.ranks
    todo = micro_batch_rounds([rows[index] for index in live], settings, ranks.world_size)
    for of_ranks in todo:
        chosen = [live[index] for index in of_ranks[ranks.rank]]
        packed = [rows[index] for index in chosen] or [_padding(rows[0])]
        batch = pack(packed, policy.device, share_prompts=settings.share_prompts)
        logprobs_BT = replay_logprobs(policy, batch, settings)
        for index, values_T, action_T in zip(chosen, logprobs_BT, batch.action_mask_BT, strict=False):
            mine[str(index)] = values_T[action_T.bool()].cpu().contiguous()
    for part in lockstep.gather(save(mine)):
        for index, values_T in load(part).items():
            yield int(index), values_T


def _optional_columns(values: Sequence[Tensor | None], batch: TrainBatch) -> Tensor | None:
    present = [value for value in values if value is not None]
    return _completion_columns(present, batch.attention_mask_BT) if len(present) == len(values) else None


def _completion_columns(values: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
    """[B, T] with each row's values at its last tokens, which are its completion; 0 elsewhere."""
    columns_BT = torch.zeros(mask_BT.shape, dtype=values[0].dtype)
    for index, (length, value_T) in enumerate(zip(mask_BT.sum(1).tolist(), values, strict=True)):
        columns_BT[index, length - len(value_T) : length] = value_T
    return columns_BT.to(mask_BT.device)


def _some(rows: Sequence[Row]) -> str:
    return ", ".join(row.name for row in rows[:3]) + (" ..." if len(rows) > 3 else "")
