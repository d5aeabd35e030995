"""Stage 2, and every refresh in RL: train the projector through the latent chain, the base frozen.

traces -> lite rows -> [alignment] -> expand with gradient -> cross-entropy after the first marker
       -> AdamW on the projector -> held-out loss with real, no and shuffled latents
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lrscale.config.arms import Arm
from lrscale.objective import after_first_marker_mask, learning_rate_at, projector_loss
from lrscale.parallel.engine import NonFiniteError
from lrscale.report.timing import step_line
from lrscale.stages.alignment import align_projector
from lrscale.stages.batching import padded, rounds
from lrscale.stages.clock import phase_timer
from lrscale.stages.distillation import count_places, distillation_loss
from lrscale.stages.drain import Drained
from lrscale.stages.failed_step import keep_failed
from lrscale.stages.heldout import heldout_losses
from lrscale.stages.journal import Journal
from lrscale.stages.lite_rows import LiteRow, lite_rows, split_heldout, with_marker_prompts
from lrscale.stages.parts import Parts
from lrscale.stages.randomness import shuffled
from lrscale.stages.run_log import logger
from lrscale.stages.traces import read_traces

STAGE = "projector_sft"
PADDING = LiteRow("padding", ids=(0,), spans=(), replaced=())
"""What a rank runs that has no row of its own in a round: no token of it is counted."""
USUAL_SCALE = (0.1, 10.0)
"""rms(latent) / rms(embedding) outside of this range is warned about."""
_MEND = "Lower the learning rate, or use projector.kind: normalised"


@dataclass(frozen=True, slots=True)
class Training:
    """What tells one projector training from another."""

    learning_rate: float
    epochs: int
    arm: Arm | None = None
    refresh: int = 0
    """0 is stage 2 itself; refreshes inside an arm count from 1."""
    step: int = 0
    """RL step of a refresh."""

    def where(self, step: int) -> str:
        """Which optimizer step of which training, for error messages."""
        if self.arm is None:
            return f"projector SFT, step {step}"
        return f"refresh {self.refresh} of {self.arm} (RL step {self.step}), step {step}"


def run_projector_sft(parts: Parts, journal: Journal) -> None:
    """Stage 2 from wherever it stands to its end."""
    config = parts.recipe.stages.projector_sft
    rows, heldout = stage_rows(parts)
    if not rows:
        raise ValueError(
            "projector SFT has no rows: no kept trace has a sentence before its answer that a marker could replace. "
            "Sample more traces (stages.traces.prompts), or start from a base that reasons before it answers"
        )
    state = journal.resume(STAGE)
    if state is not None and state.get("final"):
        return
    if state is None and config.alignment.epochs:
        align_projector(parts, rows, heldout)
        journal.save(STAGE, 0, {})
    training = Training(config.learning_rate, config.epochs)
    total = total_steps(parts, len(rows), training)

    def checkpoint(step: int) -> None:
        drained = step < total and parts.drain.asked()
        if step < total and (step % config.checkpoint_every == 0 or drained):
            journal.save(STAGE, step, {})
        if drained:
            raise Drained(STAGE, step)

    train_projector(parts, rows, training, first_step=state["step"] if state else 0, after_step=checkpoint)
    log_heldout(parts, heldout, training, total)
    journal.save(STAGE, total, {"final": True})
    parts.drain.leave_if_asked(STAGE, total)


def stage_rows(parts: Parts) -> tuple[list[LiteRow], list[LiteRow]]:
    """(training, held-out) rows from the traces of stage 1; the same in every call."""
    recipe = parts.recipe
    traces, heldout = split_heldout(
        read_traces(parts.run_dir, parts.engine.lockstep), recipe.stages.traces.heldout_share, recipe.seed
    )
    rows = [
        lite_rows(
            with_marker_prompts(some, parts.book),
            parts.policy.detector,
            recipe.stages.traces,
            recipe.seed,
            "lite",
            name,
        )
        for some, name in ((traces, "train"), (heldout, "heldout"))
    ]
    kept = shuffled(rows[1], recipe.seed, "heldout rows")[: recipe.stages.projector_sft.heldout_rows]
    return rows[0], kept


def train_projector(
    parts: Parts,
    rows: Sequence[LiteRow],
    training: Training,
    *,
    first_step: int = 0,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Optimizer steps `first_step` to the end over the rows; each is a function of its number alone."""
    config = parts.recipe.stages.projector_sft
    total = total_steps(parts, len(rows), training)
    label = STAGE if training.arm is None else f"refresh {training.refresh}"
    epoch_batches: tuple[int, list[list[LiteRow]]] = (-1, [])
    timer = phase_timer(parts.policy)
    with parts.log.progress(label, total, done=first_step) as progress:
        for step in range(first_step, total):
            epoch, index = divmod(step, _batches_per_epoch(parts, len(rows)))
            if epoch_batches[0] != epoch:
                epoch_batches = (epoch, batches_of_epoch(parts, rows, training, epoch))
            rate = learning_rate_at(config.schedule, peak=training.learning_rate, step=step, total_steps=total)
            metrics = {"stage": STAGE, "arm": training.arm, "refresh": training.refresh, "step": step + 1}
            with parts.engine.lockstep.phase(label, step=step + 1):
                batch = epoch_batches[1][index]
                try:
                    metrics |= _optimizer_step(parts, batch, rate, training.where(step + 1))
                except NonFiniteError as error:
                    raise keep_failed(parts, batch, error, arm=training.arm, step=step + 1) from error
            metrics |= {"learning_rate": rate, "step_s": timer.take()["step_s"]}
            if step == first_step:
                warn_about_scale(metrics["latent_scale"], label)
            parts.log.record(metrics)
            if training.arm is None:
                parts.log.say(step_line(metrics, total))
            progress.advance(note=f"loss {metrics['loss']:.4f}")
            after_step(step + 1)


def log_heldout(parts: Parts, heldout: Sequence[LiteRow], training: Training, step: int) -> None:
    """Measure and record the held-out losses after a training of the projector."""
    with parts.engine.lockstep.phase("held-out loss", step=training.step or step):
        losses = heldout_losses(
            parts.policy, heldout, parts.recipe.optimisation.micro_batch_tokens, parts.engine.lockstep
        )
    if losses is None:
        if training.arm is None:
            logger.warning("no held-out loss: %d held-out rows, needed 2; sample more traces", len(heldout))
        return
    parts.log.record(
        {"stage": "heldout", "arm": training.arm, "refresh": training.refresh, "step": training.step or step, **losses}
    )
    differences = [
        f"real - {mode} {losses[f'real_minus_{mode}']:+.4f} ({_error_words(losses[f'real_minus_{mode}_se'])})"
        for mode in ("zero", "shuffled")
    ]
    parts.log.say(
        f"held-out loss after markers: real {losses['loss_real']:.4f}, zero {losses['loss_zero']:.4f}, "
        f"shuffled {losses['loss_shuffled']:.4f}; {', '.join(differences)}, "
        f"{losses['rows']} rows of {losses['prompts']} prompts"
    )


def _error_words(error: float | None) -> str:
    return "no error known: one prompt" if error is None else f"SE {error:.4f}"


def total_steps(parts: Parts, rows: int, training: Training) -> int:
    every = training.epochs * _batches_per_epoch(parts, rows)
    limit = parts.recipe.stages.projector_sft.max_steps
    return min(every, limit) if limit else every


def batches_of_epoch(parts: Parts, rows: Sequence[LiteRow], training: Training, epoch: int) -> list[list[LiteRow]]:
    """Batches of rows alike in markers and length, in a random order.

    expand takes as many rounds as the row with the most markers and as many columns as the longest stretch,
    so rows of a kind stand together. Shuffling before the (stable) sort mixes equals anew each epoch.
    """
    size = parts.recipe.stages.projector_sft.batch_rows
    names = (STAGE, training.arm or "", training.refresh, epoch)
    mixed = shuffled(rows, parts.recipe.seed, *names)
    mixed.sort(key=lambda row: (len(row.spans), row.positions // 16))
    return shuffled([mixed[i : i + size] for i in range(0, len(mixed), size)], parts.recipe.seed, *names, "order")


def warn_about_scale(scale: float | None, where: str, *, told: bool = False) -> bool:
    """Say what to do where latents do not look like inputs (stacked MLPs without a norm explode or vanish).

    Returns whether they do not; handed in as `told` the next time, it keeps the warning from being repeated
    until the scale has been usual again. None, no latents at all, changes nothing.
    """
    if scale is None:
        return told
    low, high = USUAL_SCALE
    unusual = not low <= scale <= high
    if unusual and not told:
        logger.warning(
            "%s: latents are %.3g times as large as embeddings (rms; usual is %g to %g), so the model can hardly "
            "read them. Set projector.kind: normalised",
            where, scale, low, high,
        )  # fmt: skip
    return unusual


def _prompts(rows: Sequence[LiteRow]) -> str:
    names = list(dict.fromkeys(row.prompt_id for row in rows))
    return f"prompts {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def _batches_per_epoch(parts: Parts, rows: int) -> int:
    return -(-rows // parts.recipe.stages.projector_sft.batch_rows)


def _optimizer_step(parts: Parts, batch: Sequence[LiteRow], learning_rate: float, where: str) -> dict[str, float]:
    """One update from a batch of rows, in micro-batches whose losses add up."""
    engine, policy = parts.engine, parts.policy
    tokens = sum(len(row.ids) - 1 - row.spans[0].position for row in batch)
    normaliser = torch.tensor(float(max(tokens, 1)), device=policy.device)
    loss_sum = torch.zeros((), device=policy.device)
    weight = parts.recipe.stages.projector_sft.distillation
    compared = max(1, count_places(batch, policy.detector)) if weight else 1
    distance_sum = torch.zeros((), device=policy.device)
    scales: list[float] = []
    embedding_rms = policy.backbone.embedding_rms()
    budget = parts.recipe.optimisation.micro_batch_tokens
    todo = rounds([row.positions for row in batch], budget, engine.ranks.world_size)
    with engine.training("projector"):
        for number, of_ranks in enumerate(todo, start=1):
            rows = [batch[index] for index in of_ranks[engine.ranks.rank]] or [PADDING]
            ids_BT, mask_BT = padded([row.ids for row in rows], policy.device)
            counted_BT = after_first_marker_mask([row.spans for row in rows], mask_BT)
            out = policy.expand(ids_BT, mask_BT)
            logprobs_BT = policy.token_logprobs(out.hidden_BTH, ids_BT, where_BT=counted_BT)
            loss = projector_loss(logprobs_BT, counted_BT, normaliser)
            if weight:
                distance = distillation_loss(policy, rows, out.hidden_BTH, compared)
                distance_sum += distance.detach()
                loss = loss + weight * distance
            words = None
            if not bool(torch.isfinite(loss)):
                bad = [row for row, sums in zip(rows, logprobs_BT.sum(1), strict=True) if not sums.isfinite()]
                words = f"{where}: loss is {float(loss.detach())} ({_prompts(bad)}). {_MEND}"
            engine.refuse(words)
            engine.backward(loss, last=number == len(todo))
            loss_sum += loss.detach()
            scales.append(policy.scale_ratio(out.latents, embedding_rms))
        try:
            grad_norm = engine.step(
                "projector",
                learning_rate=learning_rate,
                max_grad_norm=parts.recipe.stages.projector_sft.max_grad_norm,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{where}: {error} ({_prompts(batch)}). {_MEND}") from error
    # max: one exploding micro-batch must show
    of_all = [scale for part in engine.lockstep.gather_json(scales) for scale in part]
    finite = [scale for scale in of_all if math.isfinite(scale)]
    metrics = {
        "loss": float(engine.sum_over_ranks(loss_sum)),
        "grad_norm": grad_norm,
        "latent_scale": max(finite) if finite else None,
    }
    return metrics | ({"distillation": float(engine.sum_over_ranks(distance_sum))} if weight else {})
