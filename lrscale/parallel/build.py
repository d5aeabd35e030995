"""From a recipe to an engine: which kind, and the policy loaded the way that kind needs it.

DeepSpeed is imported only where a recipe asks for it: it takes seconds, and is there on Linux alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrscale.config.recipe import Recipe
from lrscale.latent.pace import ALONE
from lrscale.parallel.engine import Engine
from lrscale.parallel.loading import checked_source, load_policy
from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.order import OrderCheck
from lrscale.parallel.ranks import set_threads
from lrscale.parallel.single import SingleEngine

if TYPE_CHECKING:
    from lrscale.latent import LatentPolicy


def build_engine(recipe: Recipe, lockstep: Lockstep, ds_config: dict[str, Any] | None = None) -> Engine:
    """The engine of `parallel.kind` around the recipe's policy.

    `ds_config` is DeepSpeed's, every value resolved; needed for zero3. ValueError as `load_policy`.
    """
    set_threads(recipe.parallel.threads)
    engine = _engine(recipe, lockstep, ds_config)
    if not recipe.parallel.lockstep:
        engine.policy.pace = ALONE
    if recipe.parallel.check_order and not lockstep.alone:
        engine.order = OrderCheck(engine.policy)
    return engine


def _engine(recipe: Recipe, lockstep: Lockstep, ds_config: dict[str, Any] | None) -> Engine:
    kind = recipe.parallel.kind
    if kind == "single":
        policy = load_policy(recipe.model, recipe.projector)
        return SingleEngine(policy, recipe.optimisation, ranks=lockstep.ranks)
    if kind == "zero3":
        from lrscale.parallel.zero3 import Zero3Engine

        policy = load_zero3(recipe, ds_config)
        return Zero3Engine(policy, recipe.optimisation, lockstep=lockstep, ds_config=_needed(ds_config))
    from lrscale.parallel.fsdp2 import Fsdp2Engine

    return Fsdp2Engine(load_fsdp2_policy(recipe), recipe.optimisation, lockstep=lockstep)


def load_fsdp2_policy(recipe: Recipe) -> LatentPolicy:
    """The recipe's policy, sharded by FSDP2."""
    from lrscale.parallel.fsdp2_loading import load_fsdp2

    source, tokenizer, device = checked_source(recipe.model, recipe.projector)
    return _with_options(load_fsdp2(source, tokenizer, recipe.model, recipe.projector, device=device), recipe)


def load_zero3(recipe: Recipe, ds_config: dict[str, Any] | None) -> LatentPolicy:
    """The recipe's policy, partitioned; hooks that gather it come with an engine."""
    from lrscale.parallel.sharded_loading import load_sharded

    source, tokenizer, device = checked_source(recipe.model, recipe.projector)
    policy = load_sharded(
        source, tokenizer, recipe.model, recipe.projector, ds_config=_needed(ds_config), device=device
    )
    return _with_options(policy, recipe)


def _with_options(policy: LatentPolicy, recipe: Recipe) -> LatentPolicy:
    policy.logits_mib = recipe.model.logits_mib
    if recipe.model.gradient_checkpointing:
        policy.enable_checkpointing()
    return policy


def load_frozen(recipe: Recipe, lockstep: Lockstep, ds_config: dict[str, Any] | None) -> LatentPolicy:
    """A second policy that is never trained (the reference of a KL term), sharded as the engine's is."""
    if recipe.parallel.kind == "single":
        return load_policy(recipe.model, recipe.projector).requires_grad_(False)
    if recipe.parallel.kind == "zero3":
        from lrscale.parallel.zero3 import attach_inference_hooks

        policy = load_zero3(recipe, ds_config)
        attach_inference_hooks(policy, _needed(ds_config))
    else:
        policy = load_fsdp2_policy(recipe)
    policy.pace = lockstep
    return policy.requires_grad_(False)


def _needed(ds_config: dict[str, Any] | None) -> dict[str, Any]:
    if ds_config is None:
        raise ValueError("parallel.kind zero3 needs ds_config.json in the run directory; start with `lrscale launch`")
    return ds_config
