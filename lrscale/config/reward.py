"""How completions are scored: one section a kind of reward, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from lrscale.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Share

PartName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]


class LengthPenaltyConfig(Section):
    """A price on length, subtracted from the reward of right answers."""

    price_per_100: NonNegativeFloat = 0.0
    """Reward lost per 100 positions."""
    latent_weight: NonNegativeFloat = 1.0
    """What a latent step costs, in tokens."""


class OverlongConfig(Section):
    """A ramp that takes reward, right or wrong, from completions near the limit of length."""

    limit: NonNegativeInt = 0
    """Positions (tokens plus latent steps) at which the whole penalty is taken; 0 switches it off."""
    ramp: PositiveInt = 256
    """Positions before the limit over which it grows from 0."""
    penalty: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _ramp_inside(self) -> OverlongConfig:
        if self.limit and self.ramp > self.limit:
            raise ValueError(f"ramp: {self.ramp} positions before a limit of {self.limit}; give at most {self.limit}")
        return self


class FormatConfig(Section):
    """A bonus for completions that hold given texts in a given order."""

    require: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = ()
    """Plain texts, e.g. ["<answer>", "</answer>"]; empty switches it off."""
    bonus: PositiveFloat = 0.1


class PoolConfig(Section):
    """Worker processes of a rank that score while it decodes."""

    workers: PositiveInt = 4
    """Processes of each rank. One that hangs or dies is replaced."""
    memory_mib: NonNegativeInt = 8192
    """Data that a worker may hold; past it allocations fail in the worker. 0 sets no limit."""
    start_timeout_s: PositiveFloat = 300.0
    """For loading the user's file or the model."""
    batch_size: PositiveInt = 1
    """Samples handed over in one call."""
    max_wait_s: NonNegativeFloat = 0.05
    """How long a sample waits for others to fill its batch."""
    retries: NonNegativeInt = 2
    """How often a sample is tried again after an error that may pass (connections, time-outs of services)."""
    backoff_s: NonNegativeFloat = 1.0
    """Before the first retry; doubled before each further one."""
    concurrency: NonNegativeInt = 0
    """Calls in flight over all ranks (at least one a rank); 0 allows one a worker."""
    rate_per_s: NonNegativeFloat = 0.0
    """Calls a second over all ranks; 0 sets no limit."""


_MODEL_POOL = PoolConfig(workers=1, memory_mib=0, start_timeout_s=1800.0)


class _Shaped(Section):
    length_penalty: LengthPenaltyConfig = LengthPenaltyConfig()
    overlong: OverlongConfig = OverlongConfig()
    format: FormatConfig = FormatConfig()


class _Pooled(_Shaped):
    timeout_s: PositiveFloat = 60.0
    """Wall seconds that a call may take, whatever it is stuck in; then its worker is killed."""
    max_failed_share: Share = 0.2
    """Past this share of failed scores in a step the run writes a checkpoint and stops."""
    max_failed_steps: NonNegativeInt = 0
    """So many RL steps in a row with failed scores, however few, stop the run as well; 0 never."""
    pool: PoolConfig = PoolConfig()


class TaskRewardConfig(_Shaped):
    """The task's own rule (exact boxed answer)."""

    kind: Literal["task"] = "task"


class FunctionRewardConfig(_Pooled):
    """A Python function in the user's file, as TRL or as OpenRLHF writes them."""

    kind: Literal["function"]
    path: str
    """Python file, relative to the recipe."""
    name: str = ""
    """Function in that file; empty takes `reward`, `reward_func` or `reward_fn`, whichever is there."""


class WeightedFunctionConfig(Section):
    """One of several reward functions."""

    label: PartName
    """Its name in metrics."""
    path: str
    """Python file, relative to the recipe."""
    name: str = ""
    """Function in that file, as in reward.name."""
    weight: float = 1.0


class FunctionsRewardConfig(_Pooled):
    """Several Python functions; the reward is their weighted sum, each is logged apart."""

    kind: Literal["functions"]
    functions: Annotated[tuple[WeightedFunctionConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _labels_once(self) -> FunctionsRewardConfig:
        labels = [function.label for function in self.functions]
        if len(set(labels)) != len(labels):
            raise ValueError(f"functions: each label once (given {', '.join(labels)})")
        own = sorted({"task", "length", "overlong", "format"} & set(labels))
        if own:
            raise ValueError(f"functions: the label {own[0]} is taken by lrscale's own parts of a reward")
        return self


class HttpRewardConfig(_Pooled):
    """A service that speaks OpenRLHF's remote reward contract: {query, prompts, labels} in, {rewards} out."""

    kind: Literal["http"]
    url: Annotated[str, StringConstraints(pattern=r"^https?://\S+$")]
    token_file: str = ""
    """File with a bearer token, read by the workers alone; empty sends none."""
    pool: PoolConfig = PoolConfig(workers=8, memory_mib=2048, batch_size=8, retries=6)


class ModelRewardConfig(_Pooled):
    """A sequence classifier with one output, read by transformers."""

    kind: Literal["model"]
    path: str
    """Folder or hub id."""
    device: str = "cpu"
    """`cuda` is the rank's own GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: PositiveInt | None = None
    """CPU threads of a worker; null leaves it torch's choice."""
    max_tokens: PositiveInt = 4096
    """Prompt and completion together; longer ones are `invalid`, never cut."""
    timeout_s: PositiveFloat = 600.0
    pool: PoolConfig = _MODEL_POOL.model_copy(update={"batch_size": 8})


class VrCliRewardConfig(_Pooled):
    """How much the reasoning helps a frozen generator to foresee the gold continuation, in percent (VR-CLI)."""

    kind: Literal["vr_cli"]
    path: str
    """The frozen generator: folder or hub id of a causal language model."""
    device: str = "cpu"
    """`cuda` is the rank's own GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: PositiveInt | None = None
    """CPU threads of a worker; null leaves it torch's choice."""
    max_tokens: PositiveInt = 8192
    """Context and continuation together; longer ones are `invalid`, never cut."""
    timeout_s: PositiveFloat = 600.0
    pool: PoolConfig = _MODEL_POOL


PooledRewardConfig = (
    FunctionRewardConfig | FunctionsRewardConfig | HttpRewardConfig | ModelRewardConfig | VrCliRewardConfig
)
RewardConfig = Annotated[TaskRewardConfig | PooledRewardConfig, Field(discriminator="kind")]
