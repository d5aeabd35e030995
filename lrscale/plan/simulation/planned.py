"""The scenario of a recipe: its step by the plan's rates, its failures and scores as given or assumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lrscale.config.hardware import Machine
from lrscale.config.recipe import Recipe
from lrscale.plan.duration import duration_s
from lrscale.plan.fit import overflow
from lrscale.plan.layout import Layout
from lrscale.plan.memory import memory_plan
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.simulation.lengths import AssumedLengths, InLatents, InWords, LatentForm, LengthSource
from lrscale.plan.simulation.scenario import Costs, Failures, LognormalLatency, Scenario, Scoring
from lrscale.plan.states import ZeroSettings
from lrscale.plan.step_rates import StepModel
from lrscale.plan.step_time import step_model
from lrscale.plan.workload import Workload

_ENGINE_GPUS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What neither recipe nor machine say; None leaves it to the recipe, or to the machine's `runs` constants."""

    steps: int | None = None
    failures_per_node_day: float | None = None
    requeue_s: float | None = None
    lengths: LengthSource | None = None
    other_lengths: LengthSource | None = None
    """Of the other way of reasoning (discrete for a recipe with latents), where a run has told them."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A recipe on a machine, for any layout of its nodes."""

    recipe: Recipe
    dims: ModelDims
    machine: Machine
    work: Workload
    assumptions: Assumptions = Assumptions()
    zero: ZeroSettings | None = None
    """Of the recipe's DeepSpeed file; None: those of the shipped files."""

    def scenario(self, layout: Layout) -> Scenario:
        """As laid out. ValueError where the layout is impossible, or where an engine holds no sequence."""
        rl, cluster, given = self.recipe.stages.rl, self.recipe.cluster, self.assumptions
        model = step_model(self.recipe, self.dims, layout, self.machine, work=self.work)
        limit_s = None if cluster.time_limit is None else float(duration_s(cluster.time_limit) - cluster.drain_s)
        return Scenario(
            steps=given.steps or rl.steps,
            prompts_per_step=self.work.prompts,
            group_size=self.work.group,
            prompt_tokens=round(self.work.prompt_tokens),
            lengths=self.lengths,
            costs=costs_of(model, self.work),
            scoring=Scoring(
                model.scoring_workers, LognormalLatency(self.work.scoring_s, self.machine.runs.score_spread.value)
            ),
            engines=model.engines,
            train_nodes=layout.train_nodes,
            generate_nodes=layout.rollout_nodes,
            placement="colocated" if layout.colocated else "split",
            schedule="one_step_off" if layout.one_step_off else "synchronous",
            continuous=model.refills,
            checkpoint_every=rl.checkpoint_every,
            refresh_every=self.work.refresh_every,
            failures=self._failures,
            time_limit_s=limit_s,
            drain_s=float(cluster.drain_s),
            arms=len(rl.arms),
        )

    @property
    def lengths(self) -> LengthSource:
        return self.assumptions.lengths or AssumedLengths(self.work.lengths, self.work.latent_share)

    @property
    def form(self) -> LatentForm:
        """What a latent step stands for."""
        traces = self.recipe.stages.traces
        usual = self.machine.runs
        marker = 3 if self.recipe.model.add_marker_tokens else round(usual.marker_tokens.value)
        return LatentForm(traces.token_ratio, traces.max_steps, usual.sentence_tokens.value, marker)

    def in_the_other_way(self, scenario: Scenario) -> Scenario:
        """The same run whose reasoning is discrete if the recipe's has latents, and the other way round."""
        given = self.assumptions.other_lengths
        if self.work.latent_share:
            words = given or InWords(scenario.lengths, self.form, self.work.lengths.longest)
            return replace(scenario, lengths=words, refresh_every=0)
        ratios = self.recipe.stages.traces.replace_ratios
        latents = given or InLatents(scenario.lengths, self.form, sum(ratios) / len(ratios))
        return replace(scenario, lengths=latents)

    def engines_of(self, layout: Layout) -> Iterator[Layout]:
        """The same nodes with vLLM engines beside the trainer, by GPUs an engine: as laid out, or whatever a node can
        hold."""
        gpus = layout.gpus_per_node
        widths = [layout.tensor_parallel] if layout.engine == "vllm" else [n for n in _ENGINE_GPUS if gpus % n == 0]
        for width in widths:
            yield Layout(layout.nodes, gpus, engine="vllm", tensor_parallel=width, weight_files=layout.weight_files)

    def candidates(self, layout: Layout) -> list[int]:
        """Numbers of the nodes that could generate and do nothing else, 0 for none: the sequences divide over the GPUs
        of the others."""
        return [
            generate
            for generate in range(layout.nodes)
            if self.work.sequences % ((layout.nodes - generate) * layout.gpus_per_node) == 0
        ]

    def split(self, kind: Layout, generate_nodes: int) -> Scenario:
        """Engines of this kind with so many nodes that generate. ValueError where that is impossible, or does not fit into memory."""
        # Beside the trainer on GPUs lrscale hands weights over as files alone.
        files = kind.weight_files or not generate_nodes
        layout = kind.resized(rollout_nodes=generate_nodes, train_nodes=kind.nodes - generate_nodes, weight_files=files)
        memory = memory_plan(self.recipe, self.dims, layout, self.machine, self.zero)
        over = overflow(memory, self.recipe)
        if over is not None:
            where = "of a host" if over.host else "a GPU"
            raise ValueError(f"{over.phase.name} takes {over.needed:.1f} of {over.limit:g} GiB {where}")
        return self.scenario(layout)

    @property
    def _failures(self) -> Failures:
        given, usual = self.assumptions, self.machine.runs
        rate, requeue_s = given.failures_per_node_day, given.requeue_s
        return Failures(
            usual.failures_per_node_day.value if rate is None else rate,
            usual.detect_s.value,
            usual.requeue_s.value if requeue_s is None else requeue_s,
        )


def costs_of(model: StepModel, work: Workload) -> Costs:
    """The plan's rates as the simulation takes them."""
    latents = work.latent_share
    return Costs(
        prefill_tokens_per_s=model.prefill_positions_per_s,
        decode_s=lambda rows, context: model.decode_step_s(rows, context, latents),
        max_rows=_rows(model, work),
        logprob_s_per_token=work.logprob_passes * model.logprob_s,
        update_s_per_token=work.passes * model.update_s,
        update_s=work.passes * work.minibatches * model.optimizer_s,
        publish_s=model.publish_s,
        refresh_s=model.refresh_s,
        checkpoint_s=model.checkpoint_s,
        start_s=model.start_s + model.load_s,
        resume_s=model.resume_s,
    )


def _rows(model: StepModel, work: Workload) -> int:
    """Rows of the mean length that an engine holds; 0 where its cache has no room for one."""
    own = work.lengths.mean
    return model.places(work.prompt_tokens, own, work.group) if model.cache_positions >= work.prompt_tokens + own else 0
