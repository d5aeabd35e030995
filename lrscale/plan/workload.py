"""What one RL step has to do, whatever does it: sequences, their lengths, passes over them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lrscale.config.arms import LATENT_ARMS
from lrscale.config.hardware import Machine, load_machine
from lrscale.config.optimisation import SEEN_BUDGETS, SHARING_GAIN
from lrscale.config.recipe import Recipe
from lrscale.config.reward import TaskRewardConfig
from lrscale.plan.lengths import Lengths
from lrscale.plan.topology import longest_prompt


@dataclass(frozen=True, slots=True)
class Workload:
    """One RL step."""

    prompts: int
    group: int
    prompt_tokens: float
    """Mean length of a prompt."""
    lengths: Lengths
    """Of completions, in positions."""
    latent_share: float
    """Of the positions of completions."""
    logprob_passes: int
    """Forwards besides the update's: recomputed old log-probs, the reference of a KL term, and recomputed latents, whose
    gathering of weights for every latent step is left out."""
    passes: int
    """Over all sequences, in the update."""
    minibatches: int
    """Optimizer steps a pass."""
    micro_batch_tokens: int
    share_prompts: bool
    """Whether samples of a prompt that stand in one micro-batch run it once."""
    refresh_every: int
    """RL steps from one refresh of the projector to the next; 0: none."""
    sft_rows: int
    """Rows that projector SFT trains on before RL, all epochs together."""
    refresh_rows: int
    """Rows that a refresh trains on."""
    refresh_latents: int
    """Latent steps of one of these rows."""
    scoring_s: float
    """Mean of a score."""

    @property
    def sequences(self) -> int:
        return self.prompts * self.group

    @property
    def positions(self) -> float:
        """Of all sequences, prompts included."""
        return self.sequences * (self.prompt_tokens + self.lengths.mean)

    @property
    def spared(self) -> float:
        """Share of the update's rows whose prompt another row of their micro-batch runs (`lrscale.stages.batching`)."""
        if not self.share_prompts:
            return 0.0
        own, whole = self.lengths.mean, self.prompt_tokens + self.lengths.mean
        fitting = (self.micro_batch_tokens - self.prompt_tokens) / own
        seen = SEEN_BUDGETS * self.micro_batch_tokens / whole
        together = max(1, math.floor(min(self.group / self.minibatches, fitting, seen)))
        spared = 1 - 1 / together
        return spared if 1 - spared * self.prompt_tokens / whole <= SHARING_GAIN else 0.0

    @property
    def completion_positions(self) -> float:
        return self.sequences * self.lengths.mean

    @property
    def tokens(self) -> float:
        """Discrete tokens that are generated."""
        return self.completion_positions * (1 - self.latent_share)


def workload(  # noqa: PLR0913 - what is known of sequences
    recipe: Recipe,
    machine: Machine | None = None,
    *,
    prompt_tokens: float | None = None,
    mean_new_tokens: float | None = None,
    spread: float | None = None,
    latent_share: float | None = None,
    scoring_s: float | None = None,
) -> Workload:
    """The RL step of a recipe. None takes what the machine's constants assume (None: the shipped ones)."""
    rl, limit = recipe.stages.rl, recipe.rollout.max_new_tokens
    machine = machine or load_machine()
    assumed = machine.sequences
    longest = longest_prompt(recipe)
    usual = assumed.prompt_share.value * longest if longest else assumed.prompt_tokens.value
    mean = assumed.completion_share.value * limit if mean_new_tokens is None else mean_new_tokens
    latent = any(arm in LATENT_ARMS for arm in rl.arms)
    share = (assumed.latent_share.value if latent else 0.0) if latent_share is None else latent_share
    every = 0 if not rl.refresh.share or not latent else rl.refresh.every_steps or _steps_of_a_pass(recipe)
    recomputed_latents = latent and recipe.rollout.kind == "vllm" and recipe.rollout.latents == "recompute"
    by_rule = isinstance(recipe.reward, TaskRewardConfig)  # at once, in the processes that sample
    traces = every * rl.prompts_per_step * rl.group_size * assumed.positive_share.value * rl.refresh.share
    return Workload(
        prompts=rl.prompts_per_step,
        group=rl.group_size,
        prompt_tokens=usual if prompt_tokens is None else prompt_tokens,
        lengths=Lengths(mean, limit, assumed.length_spread.value if spread is None else spread),
        latent_share=share,
        # expand gives the log-probs of the latents that it recomputes
        logprob_passes=(rl.importance.old_logprobs == "recomputed" or recomputed_latents) + (rl.kl.coefficient > 0),
        passes=rl.passes,
        minibatches=rl.minibatches,
        micro_batch_tokens=recipe.optimisation.micro_batch_tokens,
        share_prompts=recipe.shares_prompts,
        refresh_every=every,
        sft_rows=_sft_rows(recipe, assumed.positive_share.value),
        refresh_rows=round(traces * len(recipe.stages.traces.replace_ratios)),
        refresh_latents=round(markers_of_a_trace(recipe, machine, mean * (1 - share)) * recipe.stages.traces.max_steps),
        scoring_s=(0.0 if by_rule else assumed.scoring_s.value) if scoring_s is None else scoring_s,
    )


def _sft_rows(recipe: Recipe, right: float) -> int:
    """A row for each ratio and trace that is right, those for the held-out loss left out."""
    traces, sft = recipe.stages.traces, recipe.stages.projector_sft
    kept = traces.prompts * traces.samples_per_prompt * right * (1 - traces.heldout_share)
    rows = round(kept * len(traces.replace_ratios)) * sft.epochs
    return min(rows, sft.max_steps * sft.batch_rows) if sft.max_steps else rows


def markers_of_a_trace(recipe: Recipe, machine: Machine, tokens: float) -> float:
    """Sentences of so many tokens that a marker replaces: the mean of the recipe's ratios (LiteReason's s_r)."""
    ratios = recipe.stages.traces.replace_ratios
    return max(1.0, tokens / machine.runs.sentence_tokens.value * sum(ratios) / len(ratios))


def scoring_workers(recipe: Recipe, ranks: int) -> int:
    """That score side by side: those of the pool of every rank, or the ranks themselves by the task's own rule."""
    if isinstance(recipe.reward, TaskRewardConfig):
        return ranks
    pool = recipe.reward.pool
    workers = pool.workers * ranks
    return min(workers, max(pool.concurrency, ranks)) if pool.concurrency else workers


def _steps_of_a_pass(recipe: Recipe) -> int:
    """RL steps over all training prompts; where the task does not say how many there are, those of the traces."""
    prompts = getattr(recipe.task, "train_prompts", recipe.stages.traces.prompts)
    return max(1, -(-prompts // recipe.stages.rl.prompts_per_step))
