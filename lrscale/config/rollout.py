"""How sequences are sampled, and by what."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from lrscale.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

Variable = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")]


class Sampling(Section):
    """What every way of sampling takes."""

    outlives_kind: ClassVar[bool] = True
    """A recipe that changes the kind keeps these keys of the recipe before it."""

    max_new_tokens: PositiveInt = 2048
    """Positions a completion may take: discrete tokens plus latent steps."""
    min_new_tokens: NonNegativeInt = 0
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegativeInt = 0
    """0 keeps the whole vocabulary."""
    batch_rows: PositiveInt = 256
    """Sequences decoded side by side, on a rank or in an engine."""


class LocalRolloutConfig(Sampling):
    """Decoding in the training process itself."""

    kind: Literal["local"] = "local"


class VllmRolloutConfig(Sampling):
    """Decoding by vLLM engines in processes of their own, which are given the weights after every step."""

    kind: Literal["vllm"]
    placement: Literal["colocated", "separate"] = "colocated"
    """`colocated`: started by the trainer, as many on each of its nodes, whose GPUs both use by turns. `separate`: on
    nodes of their own, where a role of cluster.split runs `lrscale serve-rollouts`."""
    engines: PositiveInt = 1
    """Engines altogether."""
    tensor_parallel: PositiveInt = 1
    """GPUs an engine."""
    gpu_memory_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Of a GPU's memory, for weights and KV cache of an engine, which takes it all at its start; null takes 0.6 beside
    the trainer (`colocated`) and 0.9 on nodes of their own."""
    max_model_len: PositiveInt | None = None
    """Longest sequence, prompt and latents included; null takes the model's."""
    enforce_eager: bool = False
    """No torch.compile and no CUDA graphs: starts faster, decodes slower."""
    latents: Literal["engine", "recompute"] = "engine"
    """`engine`: those that the engine used are sent over, and stages.rl.audit_every compares them with the trainer's.
    `recompute`: the trainer computes the latents of all rollouts itself, and its own log-probs with them: on sharded
    weights a pass over all of them for every latent step, which can take longer than the sampling."""
    transport: Literal["files", "broadcast"] = "files"
    """How weights reach the engines. `files`: through shared memory, or through the run directory's file system where
    engines are `separate`. `broadcast`: over the network, from the main rank to all engines at once (NCCL between GPUs,
    gloo between CPUs); a bucket that takes longer than half of parallel.stall_limit_s ends the run. Not on GPUs that
    trainer and engines share."""
    other_modes: Literal["refuse", "local"] = "refuse"
    """What vLLM has no mode for (explicit traces; arms other than latent): `local` leaves it to the trainer itself."""
    probe_tolerance: PositiveFloat | None = None
    """Largest difference of log-probs between engine and trainer on fixed prompts after each publication; null takes
    0.001 for float32 and 0.25 for narrower weights. More ends the run."""
    request_timeout_s: PositiveFloat = 1800.0
    """Longest wait for one sequence, in seconds; then it is sampled again, and after three times the run ends."""
    start_timeout_s: PositiveFloat = 1800.0
    """Longest start of an engine, in seconds."""
    environment: dict[Variable, str] = Field(default_factory=dict)
    """Further variables for the engines (VLLM_CPU_KVCACHE_SPACE: "4"). Written into the run directory: no secrets."""

    @property
    def engine_memory_share(self) -> float:
        """`gpu_memory_share`, or what stands for null."""
        return self.gpu_memory_share or (0.6 if self.placement == "colocated" else 0.9)


RolloutConfig = Annotated[LocalRolloutConfig | VllmRolloutConfig, Field(discriminator="kind")]
