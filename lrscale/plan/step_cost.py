"""A whole RL step from its parts, and what a run of such steps costs."""

from __future__ import annotations

from dataclasses import dataclass

from lrscale.config.hardware import Machine
from lrscale.config.recipe import Recipe
from lrscale.plan.layout import Layout
from lrscale.plan.lumps import Lump, lumps_of_steps
from lrscale.plan.stage_time import StageTimes
from lrscale.plan.step_rates import StepModel
from lrscale.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one RL step, by what they are spent on; what comes every so many steps counts with its share."""

    rollout: float
    scoring: float
    log_probs: float
    update: float
    publish: float
    refreshing: Lump
    saving: Lump
    one_step_off: bool = False

    @property
    def refresh(self) -> float:
        return self.refreshing.mean_s

    @property
    def checkpoint(self) -> float:
        return self.saving.mean_s

    @property
    def training(self) -> float:
        """What the trainer's GPUs are busy with between two publications, on average."""
        return self.log_probs + self.update + self.refresh + self.checkpoint

    @property
    def generating(self) -> float:
        return self.rollout + self.scoring

    @property
    def total(self) -> float:
        """Synchronous: one after the other. One step off policy: the slower side decides, step by step, and weights are
        published while neither works (verl's one-step-off-policy recipe, and arXiv 2505.24298, section 4)."""
        if not self.one_step_off:
            return self.generating + self.training + self.publish
        always = self.log_probs + self.update
        lumps = lumps_of_steps(self.refreshing, self.saving)
        return self.publish + sum(share * max(self.generating, always + lump) for share, lump in lumps)


@dataclass(frozen=True, slots=True)
class RunCost:
    """Of a whole run: its start, the stages before RL, the RL steps of every arm and their evaluations."""

    hours: float
    rl_hours: float
    """Of the RL steps alone."""
    gpu_hours: float
    energy_kwh: float
    """At most: boards at their limit, and the servers around them."""
    price: float | None
    """None without a price a GPU-hour."""
    tokens_per_gpu_s: float
    """Positions that are generated and trained on, over all GPUs."""


def step_time(model: StepModel, work: Workload, recipe: Recipe) -> StepTime:
    """The step that a workload takes at these rates."""
    lengths = work.lengths.quantiles(work.sequences)
    rollout_s = model.rollout_s(work.prompts, work.group, work.prompt_tokens, lengths, work.latent_share)
    return StepTime(
        rollout=rollout_s,
        scoring=scoring_s(work, model.scoring_workers, rollout_s),
        log_probs=work.logprob_passes * work.positions * model.logprob_s,
        update=work.passes * (work.positions * model.update_s + work.minibatches * model.optimizer_s),
        publish=model.publish_s,
        refreshing=Lump(model.refresh_s, work.refresh_every),
        saving=Lump(model.checkpoint_s, recipe.stages.rl.checkpoint_every),
        one_step_off=model.one_step_off,
    )


def scoring_s(work: Workload, workers: int, rollout_s: float) -> float:
    """From the end of the last sequence to the last score: its own, or what of the queue is left then. As if all took
    the mean; the simulation draws their times."""
    return max(work.scoring_s, work.sequences * work.scoring_s / workers - rollout_s)


def run_cost(  # noqa: PLR0913 - everything that a run is made of
    step: StepTime,
    model: StepModel,
    work: Workload,
    recipe: Recipe,
    layout: Layout,
    machine: Machine,
    stages: StageTimes,
    price: float | None = None,
) -> RunCost:
    """Of the recipe's stages and all its RL steps, every arm of it.

    Energy is the boards' limit times what the server around them draws at most (Llama 3.1's model card counts
    boards at their limit too).
    """
    rl = recipe.stages.rl
    rl_s = len(rl.arms) * rl.steps * step.total
    seconds = model.start_s + model.load_s + stages.total + rl_s
    gpu_hours = seconds / 3600 * layout.gpus
    watts = machine.gpu.power_w * machine.overheads.node_power_factor.value
    return RunCost(
        hours=seconds / 3600,
        rl_hours=rl_s / 3600,
        gpu_hours=gpu_hours,
        energy_kwh=gpu_hours * watts / 1000,
        price=None if price is None else price * gpu_hours,
        tokens_per_gpu_s=work.positions / step.total / layout.gpus,
    )
