"""A sharded engine beside the plain one: gradients of the first update and losses of four, projector SFT and RL.

    equality KIND FOLDER OTHER_FOLDER [--checkpointing] [--offload] [--bf16] [--park] [--persistent]

--offload: optimizer and parameters in CPU memory; --persistent: small tensors stay whole; --park: the states are moved
away and back before every step. The plain engine loads FOLDER, the sharded one OTHER_FOLDER: the same for the test,
another for its control.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from lrscale.config.recipe import Recipe
from lrscale.config.stages import RlConfig
from lrscale.latent import LatentPolicy
from lrscale.parallel.engine import Engine, ParameterGroup
from lrscale.stages.lite_rows import LiteRow
from lrscale.stages.projector_sft import _optimizer_step
from lrscale.stages.update import Row, UpdateSettings, update_policy
from tests.distributed.programs.job import DS_CONFIG, build, narrow, offloading, report, start, uneven_rows

MICRO_BATCH_TOKENS = 150
"""Small, so that an update takes several micro-batches, and ranks a different number of rows in each."""


def main() -> None:
    kind, folder, other = sys.argv[1:4]
    lockstep = start()
    model = {"gradient_checkpointing": "--checkpointing" in sys.argv}
    ds_config = offloading(DS_CONFIG) if "--offload" in sys.argv else DS_CONFIG
    if "--persistent" in sys.argv:
        zero = {**ds_config["zero_optimization"], "stage3_param_persistence_threshold": 1280}
        ds_config = {**ds_config, "zero_optimization": zero}
    if "--bf16" in sys.argv:
        model, ds_config = {**model, "dtype": "bfloat16"}, narrow(ds_config)
    engines = {"plain": build("single", Path(folder), lockstep, **model)}
    engines["sharded"] = build(kind, Path(other), lockstep, ds_config=ds_config, **model)
    policy = engines["plain"].policy
    recorded = {name: Recorder(engine) for name, engine in engines.items()}
    losses: dict[str, dict[str, list[float]]] = {name: {"projector": [], "rl": []} for name in engines}
    first: dict[str, float] = {}
    for step in range(4):
        if "--park" in sys.argv:
            engines["sharded"].offload_states()
            engines["sharded"].reload_states()
        rows = [lite(policy, ids) for ids in uneven_rows(policy, seed=step) if policy.detector.find(ids)]
        for name, engine in engines.items():
            losses[name]["projector"].append(projector_step(engine, rows))
        if step == 0:
            first["projector"] = worst_difference(recorded["plain"].gradients, recorded["sharded"].gradients)
        samples = rl_rows(policy, step)
        for name, engine in engines.items():
            losses[name]["rl"].append(rl_step(engine, samples, step))
        if step == 0:
            first["rl"] = worst_difference(recorded["plain"].gradients, recorded["sharded"].gradients)
    report(
        lockstep,
        gradient_error=first,
        loss_error={
            stage: max(abs(a - b) for a, b in zip(losses["plain"][stage], losses["sharded"][stage], strict=True))
            for stage in ("projector", "rl")
        },
        losses=losses,
    )


class Recorder:
    """Keeps the whole gradients of an engine's latest update, taken just before it steps."""

    def __init__(self, engine: Engine) -> None:
        self.gradients: dict[str, Tensor] = {}
        self._engine = engine
        self._step = engine.step
        engine.step = self._recording_step  # type: ignore[method-assign]

    def _recording_step(self, group: ParameterGroup, **settings: float) -> float:
        self.gradients = whole_gradients(self._engine, group)
        return self._step(group, **settings)


def whole_gradients(engine: Engine, group: ParameterGroup) -> dict[str, Tensor]:
    """Of all parameters of the group. In one process those of narrow weights stand at their masters."""
    module = engine.policy.model if group == "base" else engine.policy.projector
    if engine.kind == "single" and engine.policy.backbone.dtype == torch.bfloat16:
        masters = engine._optimizer(group).masters.values()
        pairs = zip(module.named_parameters(), masters, strict=True)
        return {name: whole_gradient(master) for (name, _), master in pairs}
    return {name: whole_gradient(parameter) for name, parameter in module.named_parameters()}


def whole_gradient(parameter: torch.nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_tensor"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).clone().reshape(parameter.ds_shape)
    gradient = parameter.grad
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def worst_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of a tensor, against the largest entry of that tensor."""
    scale = max(float(tensor.abs().max()) for tensor in ours.values())
    return max(
        float((ours[name] - theirs[name]).abs().max() / max(float(ours[name].abs().max()), 1e-3 * scale))
        for name in ours
    )


def lite(policy: LatentPolicy, ids: list[int]) -> LiteRow:
    spans = tuple(policy.detector.find(ids))
    return LiteRow("p", tuple(ids), spans, tuple(() for _ in spans))


def projector_step(engine: Engine, rows: list[LiteRow]) -> float:
    recipe = Recipe.model_validate({"optimisation": {"micro_batch_tokens": MICRO_BATCH_TOKENS}})
    parts = SimpleNamespace(engine=engine, policy=engine.policy, recipe=recipe)
    return _optimizer_step(parts, rows, 1e-4, "test")["loss"]


def rl_rows(policy: LatentPolicy, step: int) -> list[Row]:
    """Rollouts of the plain policy with uneven advantages; markers in the prompts make sure of latents."""
    prompts = [ids[:45] for ids in uneven_rows(policy, seed=10 + step)]
    rollouts = policy.generate(prompts, max_new_tokens=24, seed=step)
    return [Row(f"r{i}", rollout, [1.0, -0.5, 0.0, 2.0, -1.0, 0.5, -2.0][i]) for i, rollout in enumerate(rollouts)]


def rl_step(engine: Engine, rows: list[Row], step: int) -> float:
    settings = UpdateSettings(
        rl=RlConfig(), mode="real", temperature=1.0, max_new_tokens=24, micro_batch_tokens=MICRO_BATCH_TOKENS, seed=0
    )
    return update_policy(engine, rows, settings, step=step, learning_rate=1e-5).loss


if __name__ == "__main__":
    main()
