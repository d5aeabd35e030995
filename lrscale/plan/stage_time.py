"""What a run does besides its RL steps: traces before, projector SFT, evaluations between."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lrscale.config.arms import OWN_LATENT_ARMS
from lrscale.config.hardware import Machine
from lrscale.config.recipe import Recipe
from lrscale.plan.layout import Layout
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.step_rates import StepModel
from lrscale.plan.step_time import step_model
from lrscale.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds; 0 for stages that the recipe leaves out (stages.run). Alignment and held-out losses are not counted."""

    traces: float
    projector_sft: float
    evaluation: float

    @property
    def total(self) -> float:
        return self.traces + self.projector_sft + self.evaluation


def stage_times(
    recipe: Recipe, dims: ModelDims, layout: Layout, machine: Machine, work: Workload, rates: StepModel
) -> StageTimes:
    """Of a run whose RL steps go at `rates`.

    vLLM's engines decode with the policy's own latents alone: traces, and the evaluations of other arms, are decoded by
    the trainer (rollout.other_modes).
    """
    stages = recipe.stages
    trainer = layout.resized(engine="local", rollout_nodes=0, tensor_parallel=1, one_step_off=False)
    own = rates if layout.engine == "local" else step_model(recipe, dims, trainer, machine, work=work)
    words = replace(work, latent_share=0.0)
    traces, evaluate = stages.traces, stages.evaluate
    batches = -(-traces.prompts // traces.prompts_per_batch)
    side_by_side = min(traces.prompts, traces.prompts_per_batch)
    rollouts = {
        arm: _sampled_s(rates if arm in OWN_LATENT_ARMS else own, work, evaluate.prompts, evaluate.samples_per_prompt)
        for arm in stages.rl.arms
    }
    every = stages.rl.evaluate_every
    times = 2 + (stages.rl.steps // every if every else 0)
    return StageTimes(
        traces=batches * _sampled_s(own, words, side_by_side, traces.samples_per_prompt) * ("traces" in stages.run),
        projector_sft=rates.projector_sft_s * ("projector_sft" in stages.run),
        evaluation=times * sum(rollouts.values()) * ("evaluate" in stages.run),
    )


def _sampled_s(rates: StepModel, work: Workload, prompts: int, samples: int) -> float:
    lengths = work.lengths.quantiles(prompts * samples)
    return rates.rollout_s(prompts, samples, work.prompt_tokens, lengths, work.latent_share)
