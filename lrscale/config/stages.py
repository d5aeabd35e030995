"""The stages of a run, in the order in which they run."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from lrscale.config.arms import Arm
from lrscale.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Share
from lrscale.config.optimisation import ScheduleConfig

"""What RL is run as; `_free`: without `reward.length_penalty`, to see beside the arm what the price of length does."""
StageName = Literal["traces", "projector_sft", "rl", "evaluate"]


class TracesConfig(Section):
    """Stage 1: explicit traces of the base model, the right ones kept."""

    prompts: PositiveInt = 1024
    samples_per_prompt: PositiveInt = 5
    replace_ratios: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = (0.10, 0.25)
    """s_r: each trace is emitted once per ratio, that share of its sentences replaced by markers."""
    token_ratio: PositiveFloat = 0.2
    """t_r: a replaced sentence of n tokens becomes int(t_r n) latent steps, clamped to [1, max_steps]."""
    max_steps: PositiveInt = 5
    merge_neighbours: bool = False
    """One marker for replaced sentences that follow each other, as many as fit into `max_steps`; the paper: one each."""
    heldout_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the traces, by prompt, kept for the held-out loss of projector SFT."""
    prompts_per_batch: PositiveInt = 32
    """Prompts sampled side by side; the stage restarts at batch granularity."""


class AlignmentConfig(Section):
    """Optional start of projector training: regression to mean embeddings of the replaced sentence's pieces."""

    epochs: NonNegativeInt = 0
    """0 skips alignment (the paper's recipe)."""
    own_rounds: NonNegativeInt = 0
    """Further rounds of as many epochs, in which the projector reads what the policy makes of its own latents."""
    learning_rate: PositiveFloat = 2e-3
    batch_pairs: PositiveInt = 512


class ProjectorSftConfig(Section):
    """Stage 2, and every refresh: the base is frozen, the loss goes through the latent chain."""

    epochs: NonNegativeInt = 1
    learning_rate: PositiveFloat = 1e-4
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", warmup_share=0.1)
    max_grad_norm: PositiveFloat = 0.2
    batch_rows: PositiveInt = 64
    max_steps: NonNegativeInt = 0
    """Stop after this many optimizer steps; 0 runs all epochs."""
    checkpoint_every: PositiveInt = 50
    heldout_rows: PositiveInt = 256
    distillation: NonNegativeFloat = 0.0
    """Weight of a second loss: behind a marker, the hidden state that the replaced words would have led to. 0 switches
    it off (the paper's recipe)."""
    alignment: AlignmentConfig = AlignmentConfig()


class RefreshConfig(Section):
    """Projector SFT on the epoch's own best traces, after each RL epoch."""

    every_steps: NonNegativeInt = 0
    """RL steps in an epoch; 0 takes one pass over the training prompts."""
    share: Share = 0.1
    """Share of the epoch's positive-reward traces used; 0 switches the refresh off."""
    learning_rate: PositiveFloat = 1e-4


class KlConfig(Section):
    """Optional KL term to the frozen starting policy."""

    coefficient: NonNegativeFloat = 0.0
    """0 builds no reference model."""
    estimator: Literal["k1", "k2", "k3"] = "k3"


class ImportanceConfig(Section):
    """Where old log-probs come from, and the correction for the difference between rollout and trainer."""

    old_logprobs: Literal["rollout", "recomputed"] = "rollout"
    correction_cap: NonNegativeFloat = 0.0
    """Truncated importance weight min(cap, exp(old - rollout)), `recomputed` only; 0 switches it off."""

    @model_validator(mode="after")
    def _cap_needs_recomputed(self) -> ImportanceConfig:
        if self.correction_cap and self.old_logprobs == "rollout":
            raise ValueError("correction_cap needs old_logprobs: recomputed; with rollout there is nothing to correct")
        return self


class RlConfig(Section):
    """Stage 3: GRPO on the discrete tokens, projector and latents constant."""

    arms: tuple[Arm, ...] = ("latent",)
    """Run one after the other from the same projector-SFT checkpoint."""
    steps: NonNegativeInt = 100
    prompts_per_step: PositiveInt = 48
    group_size: Annotated[int, Field(ge=2)] = 16
    learning_rate: PositiveFloat = 5e-7
    schedule: ScheduleConfig = ScheduleConfig()
    max_grad_norm: PositiveFloat = 1.0
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    clip_high: PositiveFloat = 0.2
    minibatches: PositiveInt = 1
    """Optimizer steps a pass over the rollouts (several updates a rollout)."""
    passes: PositiveInt = 1
    kl: KlConfig = KlConfig()
    importance: ImportanceConfig = ImportanceConfig()
    refresh: RefreshConfig = RefreshConfig()
    evaluate_every: NonNegativeInt = 0
    """Evaluate every so many steps as well; 0 evaluates before and after only."""
    checkpoint_every: PositiveInt = 10
    audit_every: NonNegativeInt = 10
    """Expand and replay the same rows every so many steps and log the drift; 0 never."""
    save_rollouts_every: NonNegativeInt = 10

    @model_validator(mode="after")
    def _arms_once(self) -> RlConfig:
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms: name each arm once, at least one (given {list(self.arms)})")
        return self


class EvaluateConfig(Section):
    """Stage 4: accuracy and length on held-out prompts, before and after RL."""

    prompts: PositiveInt = 512
    samples_per_prompt: PositiveInt = 1
    temperature: NonNegativeFloat = 1.0
    shown_rollouts: NonNegativeInt = 20
    """Rollouts written out for the report to show."""


class StagesConfig(Section):
    """Each stage with its own section."""

    run: tuple[StageName, ...] = ("traces", "projector_sft", "rl", "evaluate")
    traces: TracesConfig = TracesConfig()
    projector_sft: ProjectorSftConfig = ProjectorSftConfig()
    rl: RlConfig = RlConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _stages_in_order(self) -> StagesConfig:
        order = get_args(StageName)
        if list(self.run) != [name for name in order if name in self.run]:
            raise ValueError(
                f"run: name each stage once and in this order: {', '.join(order)} (given {list(self.run)})"
            )
        return self
