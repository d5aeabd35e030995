"""Stage 3: GRPO on the discrete tokens, projector and latents constant, the projector refreshed every epoch.

    prompts --> rollouts --> scores --> advantages --> update --> weights published --> [projector refreshed]
       ^          |  (submitted as they finish)          |                                    |
       |          +-- latents recorded ---- replayed ----+                                    |
       +--------------------------------- next step <-----------------------------------------+

Each step is a function of (checkpoint, step number), so a run that was interrupted goes on exactly.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrscale.config.arms import Arm
from lrscale.latent import LatentPolicy
from lrscale.objective import count_groups_without_signal, group_advantages, learning_rate_at
from lrscale.parallel.engine import NonFiniteError
from lrscale.records import Prompt, Rollout, RolloutGroup, Score, ScoreFailed
from lrscale.report.timing import PhaseTimer, step_line
from lrscale.reward.budget import RewardBudgetError
from lrscale.rollout.engine import SamplingPlan
from lrscale.stages.audit import audit_drift
from lrscale.stages.clock import phase_timer
from lrscale.stages.drain import Drained
from lrscale.stages.evaluate import evaluate_and_record
from lrscale.stages.failed_step import keep_failed
from lrscale.stages.journal import Journal
from lrscale.stages.lite_rows import LiteRow
from lrscale.stages.parts import Parts
from lrscale.stages.projector_sft import warn_about_scale
from lrscale.stages.randomness import stream_seed, take_cyclic
from lrscale.stages.refresh import RefreshBuffer, refresh_projector, refreshes, steps_per_epoch
from lrscale.stages.rollout_io import save_groups
from lrscale.stages.sampling import ARMS, Occasion, completion_markers, is_right, mean
from lrscale.stages.update import Row, UpdateResult, UpdateSettings, scored_rows, update_policy

STAGE = "rl"


@dataclass(slots=True)
class Totals:
    """What adds up over an arm; part of its checkpoints."""

    train_tokens: int = 0
    """Discrete tokens of all scored completions, rows without a gradient included."""
    train_positions: int = 0
    """The same with latent steps."""
    refreshes: int = 0
    failed_steps: int = 0
    """Steps in a row, up to the last one, that had failed scores."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    clock: tuple[float, float] = field(default_factory=lambda: (time.perf_counter(), time.process_time()))

    def tick(self) -> None:
        """Charge the time since the last call to the arm."""
        now = (time.perf_counter(), time.process_time())
        self.seconds += now[0] - self.clock[0]
        self.cpu_seconds += now[1] - self.clock[1]
        self.clock = now

    def count(self, rows: Sequence[Row]) -> None:
        self.train_tokens += sum(len(row.rollout.completion_ids) for row in rows)
        self.train_positions += sum(row.rollout.length for row in rows)

    def tokens(self) -> dict[str, int]:
        return {"train_tokens_total": self.train_tokens, "train_positions_total": self.train_positions}

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "clock"}


@dataclass(frozen=True, slots=True)
class ArmRun:
    """An arm with what it is given beside the parts of the run."""

    parts: Parts
    arm: Arm
    journal: Journal
    heldout: Sequence[LiteRow]
    """For the held-out loss after each refresh."""
    reference: LatentPolicy | None
    """The frozen starting policy, where a KL term asks for it."""


def run_arm(run: ArmRun, state: dict[str, Any], totals: Totals) -> None:
    """The arm's steps from `state` (empty: the first) to the last; the engine already stands there."""
    parts, arm, config = run.parts, run.arm, run.parts.recipe.stages.rl
    first = state.get("step", 0)
    buffer = None
    if refreshes(parts, arm):
        size = state.get("refresh_bytes", 0)
        buffer = refresh_buffer(parts, arm, totals.refreshes, size)
    lockstep = parts.engine.lockstep
    timer = phase_timer(parts.policy, "rollout", "score", "update", "refresh", "publish")
    told = False
    publish(parts, first)
    with parts.log.progress(f"RL {arm}", config.steps, done=first) as progress:
        for step in range(first + 1, config.steps + 1):
            groups_P = sample(run, totals, buffer, step, timer)
            rewards_PG, valid_PG = rewards(groups_P, priced=ARMS[arm].priced)
            advantages_PG = group_advantages(rewards_PG, valid_PG, config.advantage)
            look_closer(parts, arm, step, groups_P, advantages_PG)
            rows = scored_rows(groups_P, advantages_PG)
            rate = learning_rate_at(config.schedule, peak=config.learning_rate, step=step - 1, total_steps=config.steps)
            with timer.phase("update"), lockstep.phase("update", step=step):
                result = update(run, rows, step, rate)
            with timer.phase("refresh"), lockstep.phase("refresh", step=step):
                buffer = refresh_after(run, step, groups_P, buffer, totals)
            with timer.phase("publish"), lockstep.phase("publish", step=step):
                publish(parts, step, projector_only=not result.optimizer_steps)
            totals.count(rows)
            metrics = {"stage": STAGE, "arm": arm, "step": step, **describe(parts, groups_P, rewards_PG, valid_PG)}
            told = warn_about_scale(metrics["latent_scale"], f"RL {arm}, step {step}", told=told)
            metrics |= {**asdict(result), "learning_rate": rate, **totals.tokens(), **timer.take()}
            parts.log.record(metrics)
            record_scoring(parts, arm, step)
            parts.log.say(step_line(metrics, config.steps))
            progress.advance(note=f"reward {metrics['reward_mean'] or 0.0:.3f}")
            if config.evaluate_every and step % config.evaluate_every == 0 and step < config.steps:
                evaluate_and_record(parts, arm, step=step, when="during")
            drained = step < config.steps and parts.drain.asked()
            if step % config.checkpoint_every == 0 or step == config.steps or drained:
                save(run, step, totals, buffer, score=metrics["reward_mean"])
            if drained:
                raise Drained(arm, step)
            timer.take()


def publish(parts: Parts, version: int, *, projector_only: bool = False) -> None:
    """Hand the weights to whatever samples; where engines share the accelerator, its room goes to them first."""
    if parts.recipe.parallel.offload_between_phases:
        parts.engine.offload_states()
    parameters = parts.engine.full_parameters("projector" if projector_only else None)
    parts.rollouts.load_weights(parameters, version=version, projector_only=projector_only)


def save(run: ArmRun, step: int, totals: Totals, buffer: RefreshBuffer | None, *, score: float | None = None) -> None:
    """All that the arm needs to go on after the step. Collective."""
    totals.tick()
    size = buffer.size_bytes if buffer is not None else 0
    run.journal.save(run.arm, step, {"totals": totals.to_json(), "refresh_bytes": size}, score=score)


def record_scoring(parts: Parts, arm: Arm, step: int) -> None:
    """What the step's scoring cost, where it costs anything."""
    scoring = parts.sampler.scoring_metrics()
    if scoring is not None:
        parts.log.record({"stage": "reward", "arm": arm, "step": step, **scoring})


def prompts_of_step(parts: Parts, arm: Arm, step: int) -> list[Prompt]:
    """The prompts of RL step `step` (the first is 1): the same for every arm, each epoch in an order of its own."""
    count = parts.recipe.stages.rl.prompts_per_step
    pool = parts.book.prompts("train", markers=ARMS[arm].markers)
    return take_cyclic(pool, (step - 1) * count, count, parts.recipe.seed, STAGE)


def sample(
    run: ArmRun, totals: Totals, buffer: RefreshBuffer | None, step: int, timer: PhaseTimer
) -> list[RolloutGroup]:
    """The step's groups; engines that shard make room on the accelerator for it.

    Raises RewardBudgetError, with a checkpoint of where the arm stood before the step; its rollouts are kept as well.
    """
    parts, arm = run.parts, run.arm
    prompts = prompts_of_step(parts, arm, step)
    plan = SamplingPlan(seed=stream_seed(parts.recipe.seed, STAGE, step), mode=ARMS[arm].mode)
    offload = parts.recipe.parallel.offload_between_phases
    if offload:
        parts.engine.offload_states()
    occasion = Occasion(name=f"{STAGE} {arm} {step}", failed_steps=totals.failed_steps)
    failure = None
    try:
        groups_P = parts.sampler.groups(prompts, parts.recipe.stages.rl.group_size, plan, timer, occasion)
    except RewardBudgetError as error:
        failure = error
    parts.rollouts.rest()
    if offload:
        parts.engine.reload_states()
    if failure is not None:
        if (step - 1) % parts.recipe.stages.rl.checkpoint_every or step == 1:
            save(run, step - 1, totals, buffer)
        raise failure
    failed = any(not isinstance(score, Score) for group in groups_P for score in group.scores)
    totals.failed_steps = totals.failed_steps + 1 if failed else 0
    return groups_P


def update(run: ArmRun, rows: Sequence[Row], step: int, learning_rate: float) -> UpdateResult:
    """The step's optimizer steps; what was not finite is kept for `lrscale replay-step`."""
    parts, arm = run.parts, run.arm
    try:
        return update_policy(
            parts.engine,
            rows,
            settings(parts, arm),
            step=step,
            learning_rate=learning_rate,
            reference=run.reference,
        )
    except NonFiniteError as error:
        raise keep_failed(parts, rows, error, arm=arm, step=step) from error


def refresh_after(
    run: ArmRun, step: int, groups_P: Sequence[RolloutGroup], buffer: RefreshBuffer | None, totals: Totals
) -> RefreshBuffer | None:
    """Keep the step's right traces; at the end of an epoch train the projector on them and begin a new buffer.

    None, for arms without a refresh, stays None.
    """
    if buffer is None:
        return None
    buffer.add(groups_P)
    if step % steps_per_epoch(run.parts):
        return buffer
    totals.refreshes += 1
    refresh_projector(run.parts, run.arm, buffer.traces(), run.heldout, number=totals.refreshes, step=step)
    return refresh_buffer(run.parts, run.arm, totals.refreshes, 0)


def refresh_buffer(parts: Parts, arm: Arm, epoch: int, size_bytes: int) -> RefreshBuffer:
    folder = parts.run_dir / "rollouts"
    return RefreshBuffer(folder, arm, epoch, size_bytes, lockstep=parts.engine.lockstep)


def rewards(groups_P: Sequence[RolloutGroup], *, priced: bool = True) -> tuple[Tensor, Tensor]:
    """Rewards [P, G] in float64 and which of them are real: a failed score is masked, never 0.

    Not `priced`: what length cost is given back.
    """
    valid_PG = torch.tensor([[isinstance(score, Score) for score in group.scores] for group in groups_P])
    rewards_PG = torch.tensor(
        [[_reward(score, priced=priced) for score in group.scores] for group in groups_P],
        dtype=torch.float64,
    )
    return rewards_PG, valid_PG


def _reward(score: Score | ScoreFailed, *, priced: bool) -> float:
    if not isinstance(score, Score):
        return 0.0
    return score.value if priced else score.value - score.parts.get("length", 0.0)


def describe(
    parts: Parts, groups_P: Sequence[RolloutGroup], rewards_PG: Tensor, valid_PG: Tensor
) -> dict[str, float | int | None]:
    """What was sampled in a step."""
    policy, task = parts.policy, parts.book.task
    rollouts = [rollout for group in groups_P for rollout in group.rollouts]
    scores = [score for group in groups_P for score in group.scores if isinstance(score, Score)]
    markers = sum(len(completion_markers(policy, rollout)) for rollout in rollouts)
    latents = [rollout.latents_LH for rollout in rollouts if len(rollout.latents_LH)]
    latent_steps = sum(rollout.completion_latent_steps for rollout in rollouts)
    texts = map(parts.sampler.text, rollouts)
    return {
        "reward_mean": mean(rewards_PG[valid_PG].tolist()),
        "accuracy": mean([is_right(score) for score in scores]),
        "tokens_mean": mean([len(rollout.completion_ids) for rollout in rollouts]),
        "latent_steps_mean": latent_steps / len(rollouts),
        "markers_mean": markers / len(rollouts),
        "steps_per_marker_mean": latent_steps / markers if markers else 0.0,
        "no_answer_share": mean([not task.answered(text) for text in texts]),
        "groups_without_signal": count_groups_without_signal(rewards_PG, valid_PG),
        "scores_failed": len(rollouts) - len(scores),
        "latent_scale": policy.scale_ratio(latents) if latents else None,
        **engine_gap(rollouts),
        **part_means(scores),
    }


def engine_gap(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """|log-prob of the trainer - of the engine that sampled| over all tokens, where both are known."""
    gaps = [(r.trainer_logprobs_T - r.logprobs_T).abs() for r in rollouts if r.trainer_logprobs_T is not None]
    if not any(len(gap_T) for gap_T in gaps):
        return {}
    gap_N = torch.cat(gaps)
    return {"engine_gap_mean": float(gap_N.mean()), "engine_gap_max": float(gap_N.max())}


def part_means(scores: Sequence[Score]) -> dict[str, float | None]:
    """Means of what a reward is made of beside the task's value and the price of length, by name."""
    names = sorted({name for score in scores for name in score.parts} - {"task", "length"})
    return {f"part_{name}_mean": mean([score.parts[name] for score in scores if name in score.parts]) for name in names}


def look_closer(parts: Parts, arm: Arm, step: int, groups_P: Sequence[RolloutGroup], advantages_PG: Tensor) -> None:
    """The looks a run takes at itself now and then: drift, saved rollouts."""
    config = parts.recipe.stages.rl
    # Shuffled latents depend on the rows beside them, so expanding other rows cannot give them again.
    if config.audit_every and step % config.audit_every == 0 and ARMS[arm].mode == "real":
        drift = audit_drift(parts.policy, groups_P, parts.recipe.rollout.temperature)
        if drift is not None:
            parts.log.record({"stage": "audit", "arm": arm, "step": step, **drift})
    if config.save_rollouts_every and step % config.save_rollouts_every == 0:
        path = parts.run_dir / "rollouts" / f"{arm}-step-{step}.jsonl"
        about = {"arm": arm, "step": step}
        parts.engine.lockstep.on_main(
            lambda: save_groups(path, groups_P, parts.policy, about=about, advantages_PG=advantages_PG)
        )


def settings(parts: Parts, arm: Arm) -> UpdateSettings:
    recipe = parts.recipe
    return UpdateSettings(
        rl=recipe.stages.rl,
        mode=ARMS[arm].mode,
        temperature=recipe.rollout.temperature,
        max_new_tokens=recipe.rollout.max_new_tokens,
        micro_batch_tokens=recipe.optimisation.micro_batch_tokens,
        seed=recipe.seed,
        share_prompts=recipe.shares_prompts,
    )
