"""plan.json: the numbers of a plan that are kept beside a run, and that charts are drawn from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lrscale.plan.run_plan import RunPlan
from lrscale.plan.run_text import run_values
from lrscale.plan.scaling import scale_points

_KEPT = ("gpu", "fabric", "layout", "fits", "gpu_gib", "step_s", "cost")


def charted_values(plan: RunPlan, simulation: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything that the charts of a plan show; `simulation` is what a study says of itself."""
    values = run_values(plan)
    found: dict[str, Any] = {name: values[name] for name in _KEPT}
    found["gpu_limit_gib"] = plan.recipe.cluster.gpu_memory_gib
    found["every_steps"] = {"refresh": plan.work.refresh_every, "checkpoint": plan.recipe.stages.rl.checkpoint_every}
    found["scaling"] = [asdict(point) for point in scale_points(plan)]
    return found if simulation is None else {**found, "simulation": simulation}
