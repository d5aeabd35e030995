"""The same run on other numbers of GPUs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from lrscale.config.hardware import load_machine
from lrscale.config.load import load_recipe
from lrscale.launch.planning import plan_of
from lrscale.plan.run_plan import RunPlan
from lrscale.plan.scaling import ScalePoint, scale_points


def plan(*overrides: str, name: str = "llama3-70b-8n8g", **layout: object) -> RunPlan:
    return plan_of(load_recipe([name], list(overrides)), load_machine(), **layout)  # type: ignore[arg-type]


def gpus(planned: RunPlan) -> list[int]:
    return [point.gpus for point in scale_points(planned)]


def test_more_gpus_with_the_same_work() -> None:
    """Locks out GPUs over which the sequences do not divide, powers of two alone, and a step that more GPUs make slower
    to compute (longer rings and batches of few rows take a percent back)."""
    some = plan(engine="vllm", tensor_parallel=8)
    points = list(scale_points(some))
    assert [point.gpus for point in points] == [24, 32, 48, 64, 96, 128, 192, 256, 384, 768]
    assert next(point for point in points if point.gpus == 64).step_s == pytest.approx(some.step.total)
    assert all(more.step_s < 1.03 * fewer.step_s for fewer, more in pairwise(points))


@pytest.mark.parametrize("nodes", [1, 3, 12, 512])
def test_many_numbers_are_thinned_around_the_layout(nodes: int) -> None:
    """Locks out crowded points, and a chart without the layout that it is about."""
    batch = ("stages.rl.prompts_per_step=48", "stages.rl.group_size=128", "cluster.gpus_per_node=1")
    found = gpus(plan(*batch, f"cluster.nodes={nodes}", "model.path=Qwen/Qwen3-4B"))
    assert nodes in found and 10 <= len(found) <= 17 and max(found) > 2000
    assert min(b / a for a, b in pairwise(found)) > 1.5


def test_a_split_keeps_its_proportion() -> None:
    split = plan(name="llama3-70b-split", one_step_off=True)
    assert gpus(split) == [40, 80, 120, 160, 240, 320, 480, 960]


def test_one_process_does_not_scale() -> None:
    assert gpus(plan(name="tiny-cpu")) == [1]


def test_memory_is_that_of_the_deepspeed_file() -> None:
    """Locks out buckets of the shipped files in place of the user's."""

    def of_own(planned: RunPlan) -> ScalePoint:
        return next(point for point in scale_points(planned) if point.gpus == planned.layout.gpus)

    some = plan()
    assert some.zero is not None and of_own(some).fits
    assert not of_own(replace(some, zero=replace(some.zero, reduce_bucket=20 * 10**9))).fits
