"""Charts of a plan: as files, and in the report of a run that has a plan.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest

from lrscale.report import plan_panels as panels
from lrscale.report.chart_style import PNG_INK
from lrscale.report.charts import figure_of
from lrscale.report.page import write_report
from lrscale.report.plan_charts import plan_charts, write_plan_charts
from lrscale.report.plan_values import plan_values
from tests.unit.report.synthetic_run import write_run

PLAN = {
    "layout": {"gpus": 16, "one_step_off": False},
    "gpu_gib": {
        "peak": 90.0,
        "phases": {
            "load": {"total": 22.0, "states": 20.0, "whole tensors": 1.0, "allowance": 1.0},
            "update": {"total": 90.0, "states": 20.0, "activations": 65.0, "logits": 2.0, "allowance": 3.0},
        },
    },
    "gpu_limit_gib": 80.0,
    "step_s": {"rollout": 50.0, "scoring": 1.0, "log_probs": 4.0, "update": 30.0, "publish": 5.0, "total": 90.0},
    "scaling": [
        {"gpus": 8, "step_s": 170.0, "fits": False},
        {"gpus": 16, "step_s": 90.0, "fits": True},
        {"gpus": 32, "step_s": 60.0, "fits": True},
    ],
}
SPANS = [
    {"role": "train", "phase": "start", "step": 0, "start_s": 0.0, "end_s": 100.0},
    {"role": "generate", "phase": "rollout", "step": 1, "start_s": 100.0, "end_s": 150.0},
    {"role": "train", "phase": "logprobs", "step": 1, "start_s": 150.0, "end_s": 155.0},
    {"role": "train", "phase": "update", "step": 1, "start_s": 155.0, "end_s": 200.0},
    {"role": "generate", "phase": "rollout", "step": 2, "start_s": 180.0, "end_s": 260.0},
]


def test_every_chart_is_written(tmp_path):
    """Three PNG files of some size; and only those that the plan has numbers for."""
    written = write_plan_charts(PLAN, tmp_path / "new", "a run of $5")
    assert [path.name for path in written] == ["plan-memory.png", "plan-step.png", "plan-scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in written)
    assert write_plan_charts({"step_s": PLAN["step_s"]}, tmp_path, "x") == [tmp_path / "plan-step.png"]


def test_bars_add_up_to_the_plan():
    """Locks out a part of memory that no bar shows, and a time line that is not the plan's step."""
    values = plan_values(PLAN)
    assert [bar.total for bar in values.memory] == [22.0, 90.0]
    assert max(bar.end_s for bar in values.timeline) == pytest.approx(90.0)
    off = plan_values({**PLAN, "layout": {"gpus": 16, "one_step_off": True}})
    starts = {(bar.phase, bar.step): bar.start_s for bar in off.timeline}
    assert starts["rollout", 2] == starts["log-probs", 1] == 51.0 + 5.0
    assert starts["rollout", 3] - starts["rollout", 2] == pytest.approx(51.0 + 5.0)


def test_a_simulated_time_line_begins_with_the_first_rollout():
    bars = plan_values({**PLAN, "simulation": {"timeline": SPANS}}).timeline
    assert [(bar.phase, bar.end_s) for bar in bars] == [
        ("rollout", 150.0),
        ("log-probs", 155.0),
        ("update", 200.0),
        ("rollout", 200.0),
    ]


def simulated(steps: int, checkpoint_every: int, refresh_every: int) -> dict[str, Any]:
    """A run one step off policy: rollouts of 10 s, then 6 s of update while the next rollout goes on."""
    spans: list[dict[str, Any]] = []

    def add(role: str, phase: str, step: int, start_s: float, seconds: float) -> float:
        spans.append({"role": role, "phase": phase, "step": step, "start_s": start_s, "end_s": start_s + seconds})
        return start_s + seconds

    now = add("generate", "rollout", 1, 0.0, 10.0)
    for step in range(1, steps + 1):
        generated = add("generate", "rollout", step + 1, now, 10.0)
        trained = add("train", "update", step, now, 6.0)
        if step % refresh_every == 0:
            trained = add("train", "refresh", step, trained, 30.0)
        if step % checkpoint_every == 0:
            trained = add("train", "checkpoint", step, trained, 3.0)
        now = max(generated, trained)
    every = {"refresh": refresh_every, "checkpoint": checkpoint_every}
    return {**PLAN, "every_steps": every, "simulation": {"timeline": spans}}


@pytest.mark.parametrize(("checkpoint", "refresh", "steps"), [(6, 22, (22, 24)), (6, 6, (4, 6)), (40, 50, (1, 3))])
def test_a_simulated_time_line_shows_what_comes_seldom(checkpoint, refresh, steps):
    """Locks out a caption that speaks of refreshes and checkpoints that the chart does not have."""
    values = plan_values(simulated(24, checkpoint, refresh))
    assert values.simulated == steps
    shown = {bar.phase for bar in values.timeline}
    assert shown == {"rollout", "update"} | (set() if steps == (1, 3) else {"refresh", "checkpoint"})
    start, end = min(bar.start_s for bar in values.timeline), max(bar.end_s for bar in values.timeline)
    busy = {(bar.role, bar.step) for bar in values.timeline}
    assert {("generate", steps[0]), ("generate", steps[1] + 1), ("train", steps[1])} <= busy
    assert all(start <= bar.start_s < bar.end_s <= end for bar in values.timeline)
    (caption,) = (
        chart.caption for chart in plan_charts(simulated(24, checkpoint, refresh), "p") if "run" in chart.caption
    )
    assert f"refresh (every {refresh} steps)" in caption


def test_a_role_whose_bars_are_too_short_to_see_keeps_its_row():
    """Locks out scoring for hours that takes engines and trainer off the chart."""
    spans = [*SPANS, {"role": "score", "phase": "score", "step": 1, "start_s": 100.0, "end_s": 90000.0}]
    spans.append({"role": "train", "phase": "update", "step": 2, "start_s": 90000.0, "end_s": 90050.0})
    values = plan_values({**PLAN, "simulation": {"timeline": spans}})
    axes, seen = drawn(lambda axes: panels.timeline(axes, values.timeline, PNG_INK))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["engines", "scoring", "trainer"]
    assert seen == {"score"}


def drawn(draw: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Axes as they lie in a figure of the charts' size, and what `draw` returns of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = figure_of(PNG_INK, 8.0, 3.6)
    axes = figure.add_subplot()
    found = draw(axes)
    FigureCanvasAgg(figure).draw()
    return axes, found


@pytest.mark.parametrize("limit", [80.0, 60.0, 12.0])
def test_no_total_hides_the_limit(limit):
    """Locks out totals across the dashed line, at whatever distance their bar ends from it."""
    sizes = [*(limit * share / 100 for share in range(70, 110)), 3 * limit]
    phases = {f"phase {k}": {"total": size, "states": size - 3, "allowance": 3.0} for k, size in enumerate(sizes)}
    values = plan_values({**PLAN, "gpu_gib": {"phases": phases}, "gpu_limit_gib": limit})
    axes, _ = drawn(lambda axes: panels.memory(axes, values, PNG_INK))
    line = axes.transData.transform((limit, 0.0))[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(sizes) + 1
    assert [box for box in boxes if box.x0 + 0.5 < line < box.x1 - 0.5] == []
    assert sum("too much" in text.get_text() for text in axes.texts) == 10


def test_a_small_plan_is_drawn_in_mib_without_its_allowance():
    """Locks out bars that are nothing but allowance, and a legend for what cannot be seen."""
    parts = {"total": 3.11, "states": 0.1, "logits": 0.01, "latents": 1e-6, "allowance": 3.0}
    small = {**PLAN, "gpu_gib": {"phases": {"update": parts, "load": {"total": 3.1, "states": 0.1, "allowance": 3.0}}}}
    axes, seen = drawn(lambda axes: panels.memory(axes, plan_values(small), PNG_INK))
    assert seen == {"states", "logits"} and axes.get_xlabel() == "MiB a GPU"
    assert [text.get_text() for text in axes.texts] == [" 112.6", " 102.4"]
    assert "3 GiB" in plan_charts(small, "p")[0].caption
    large = {**small, "gpu_gib": {"phases": {"update": {**parts, "states": 1.2}}}}
    assert drawn(lambda axes: panels.memory(axes, plan_values(large), PNG_INK))[0].get_xlabel() == "GiB a GPU"


def test_labels_of_gpus_and_times_lie_apart():
    """As many points as there can be, on both kinds of curve; locks out labels over each other, and lines that leave
    the axes."""
    for power in (0.0, 1.0):
        gpus = [8 * round(1.334**k) for k in range(5, 22)]
        points = [{"gpus": count, "step_s": 3e5 / count**power, "fits": count > 50} for count in gpus]
        values = plan_values({**PLAN, "scaling": points, "layout": {"gpus": gpus[4]}})
        axes, _ = drawn(lambda axes, values=values: panels.scaling(axes, values, PNG_INK))
        for labels in (axes.texts, axes.get_xticklabels()):
            assert len(labels) == len(gpus)
            boxes = [label.get_window_extent() for label in labels]
            assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
            assert all(axes.figure.bbox.x0 <= box.x0 and box.x1 <= axes.figure.bbox.x1 for box in boxes)
        low, high = axes.get_ylim()
        assert all(low < time < high for line in axes.lines for time in line.get_ydata())
        assert all(a < b for a, b in pairwise(axes.get_yticks()))


@pytest.mark.parametrize(
    "damaged", [{}, {"scaling": [{"gpus": "many"}]}, {"simulation": {"timeline": [{}]}}, {"gpu_gib": 3}]
)
def test_a_damaged_plan_is_no_plan(damaged):
    """Locks out a report that is not written because of a file beside it."""
    assert plan_charts(damaged, "plan") == []


def test_the_report_shows_the_plan_of_its_run(tmp_path):
    run = write_run(tmp_path / "run", arms=("latent",), steps=4)
    (run / "plan.json").write_text(json.dumps(PLAN))
    write_report([run], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'id="plan"' in page and page.count("chart-plan-0-") > 3 and "Memory of a GPU" in page
