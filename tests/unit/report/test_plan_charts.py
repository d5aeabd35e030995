"""Charts of a plan: as files, and in the report of a run that has a plan.json."""

from __future__ import annotations

import json

import pytest

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
