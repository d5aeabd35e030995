"""A recipe simulated as `lrscale plan --simulate` does, on the shipped machine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lrscale.config.errors import RecipeError
from lrscale.config.hardware import load_machine
from lrscale.config.load import load_recipe
from lrscale.launch.errors import LaunchError
from lrscale.launch.finished_run import MeasuredRun, read_measured
from lrscale.launch.planning import plan_of
from lrscale.launch.simulating import SimulationOptions, simulate
from lrscale.plan.run_plan import RunPlan
from lrscale.plan.simulation.findings import study_lines
from lrscale.plan.simulation.planned import PlannedRun, costs_of
from lrscale.plan.simulation.splits import few_steps, steady_step_s
from lrscale.plan.simulation.study import Study


def plan(*overrides: str, **layout: object) -> RunPlan:
    """The 70B recipe, engines of eight GPUs beside the trainer unless said otherwise."""
    kinds = {"engine": "vllm", "tensor_parallel": 8, **layout}
    return plan_of(load_recipe(["llama3-70b-8n8g"], list(overrides)), load_machine(), **kinds)  # type: ignore[arg-type]


def found(planned: RunPlan, measured: MeasuredRun | None = None, **options: object) -> Study:
    return simulate(planned, SimulationOptions(**options), measured=measured)  # type: ignore[arg-type]


def read(run_dir: Path) -> MeasuredRun:
    return read_measured(run_dir, limit=2048, spread=0.6)


@pytest.fixture(scope="module")
def studied() -> Study:
    seldom = plan("stages.rl.checkpoint_every=12")  # much longer than is best with so many failures
    return found(seldom, seeds=3, steps=20, failures_per_node_day=3.0)


def test_the_simulated_step_is_near_the_roofline() -> None:
    """The same rates, closed form against events: locks out a rate that is passed on as another one."""
    planned = plan("stages.rl.importance.old_logprobs=recomputed", "stages.rl.minibatches=2")
    run = PlannedRun(planned.recipe, planned.dims, planned.machine, planned.work)
    step = planned.step
    scenario = run.scenario(planned.layout)
    assert steady_step_s(scenario, few_steps(scenario)) == pytest.approx(step.total, rel=0.05)
    costs = costs_of(planned.rates, planned.work)
    assert costs.logprob_s_per_token * planned.work.positions == pytest.approx(step.log_probs)
    assert costs.update_s + costs.update_s_per_token * planned.work.positions == pytest.approx(step.update)


def test_a_study_tells_everything(studied: Study) -> None:
    """And as JSON without what JSON does not know (infinities)."""
    assert studied.seconds.low <= studied.seconds.median <= studied.seconds.high < math.inf
    assert studied.failures > 0 and studied.phases["lost"] > 0
    assert sum(studied.phases.values()) == pytest.approx(1.0)
    assert studied.split is not None and {split.generate_nodes for split in studied.split.tried} == {0, 2, 4, 5, 6, 7}
    assert studied.intervals.best.simulated < studied.intervals.chosen.simulated
    own, other = studied.reasoning
    assert (own.name, other.name, other.latent_steps) == ("with latents", "discrete", 0.0)
    assert other.tokens > own.tokens
    values = json.loads(json.dumps(studied.to_json(), allow_nan=False))
    assert {span["role"] for span in values["timeline"]} == {"generate", "train"}
    text = "\n".join(study_lines(studied, plan("cluster.max_restarts=0")))
    assert "Young" in text and "cluster.max_restarts allows 0" in text
    assert "of 20 steps (the recipe, and the plan above, have 180)" in text and "fits" not in text


def test_a_figure_that_stands_in_three_places_is_one() -> None:
    """Locks out one step off policy whose refreshes of minutes the table hid, and the layouts counted in full."""
    wide = ("stages.rl.prompts_per_step=384", "cluster.nodes=384", "stages.rl.refresh={every_steps: 3, share: 0.01}")
    planned = plan(*wide, rollout_nodes=128, tensor_parallel=4, one_step_off=True)
    study = found(planned, seeds=1, failures_per_node_day=0.0)
    assert planned.step.total > 1.05 * max(planned.step.generating, planned.step.training) + planned.step.publish
    assert study.step_s.median == pytest.approx(planned.step.total, rel=0.03)
    assert study.reasoning[0].step_s == pytest.approx(planned.step.total, rel=0.03)


def test_layouts_that_can_be_launched_stand_apart_from_those_that_cannot() -> None:
    """Locks out one step off policy, which nothing runs, as the only advice; and a trainer that decodes on its shards
    where engines would take a quarter of the time."""
    planned = plan(engine="local", tensor_parallel=1)
    study = found(planned, seeds=1, steps=3)
    assert study.split is not None
    best, off = study.split.best, study.split.best_off
    assert best.gpus_per_engine == 8 and best.step_s < study.reasoning[0].step_s / 3
    assert off.generate_nodes > 0 and off.one_step_off_s < off.step_s
    beside = next(one for one in study.split.tried if not one.generate_nodes)
    assert beside.step_s > best.step_s and math.isinf(beside.one_step_off_s), "its weights go through files"
    lines = [line for line in study_lines(study, planned) if "nodes generate" in line or "launched" in line]
    assert len(lines) == 2 and "weights by broadcast" in lines[0] and "does not run" in lines[1]
    values = study.to_json()["split"]
    assert (
        values["best"]["rollout_nodes"] == best.generate_nodes
        and values["best_one_step_off"]["rollout_nodes"] == off.generate_nodes
    )


def test_one_node_has_no_split_and_no_failures_no_interval() -> None:
    small = ("model.path=Qwen/Qwen3-4B", "stages.rl.arms=[discrete]", "stages.rl.prompts_per_step=2", "cluster.nodes=1")
    planned = plan(*small)
    study = found(planned, seeds=1, steps=3, failures_per_node_day=0.0)
    text = "\n".join(study_lines(study, planned))
    assert study.split is not None and study.split.best.generate_nodes == 0 and "one step off" not in text
    assert "none assumed" in text and "the fewer the better" in text
    assert study.reasoning[1].latent_steps > 0
    json.dumps(study.to_json(), allow_nan=False)


def test_what_a_plan_covers_is_simulated() -> None:
    """Locks out the time of one arm beside a plan of two, and money or GPU-hours that neither agree nor are said."""
    planned = plan("stages.rl.arms=[discrete,latent]", "stages.rl.steps=15", "stages.rl.refresh.every_steps=5")
    study = found(planned, seeds=1, failures_per_node_day=0.0, price=2.0)
    ends = ["5", "10", "15", "20", "25", "30"]
    refreshed = [step for step in range(1, 31) if study.scenario.refreshes(step)]
    assert [str(step) for step in refreshed] == ends
    saved = [step for step in range(1, 31) if study.scenario.saves(step)]
    assert saved == [6, 12, 15, 21, 27, 30], "each arm counts its own steps, and is saved at its end"
    starting_s = planned.rates.start_s + planned.rates.load_s
    assert study.seconds.median == pytest.approx(starting_s + 3600 * planned.cost.rl_hours, rel=0.04)
    assert study.gpu_hours.median == pytest.approx(64 * study.seconds.median / 3600)
    assert study.to_json()["price"]["median"] == 2 * study.gpu_hours.median
    lines = {line.split()[0]: line for line in study_lines(study, planned)}
    assert "1 of 15 steps for each of 2 arms, all alike" in lines["runs"]
    assert "10 to 90 %" not in lines["time"] + lines["cost"] and "; at the price given " in lines["cost"]


def test_gpu_hours_leave_the_queue_out() -> None:
    planned = plan()
    study = found(planned, seeds=1, steps=20, failures_per_node_day=3.0, requeue_s=40_000.0)
    queued = study.phases["queue"]
    assert queued > 0.3
    assert study.gpu_hours.median == pytest.approx(64 * study.seconds.median * (1 - queued) / 3600)


def test_a_run_that_never_ends_is_said_to() -> None:
    """Locks out a hang, and "never to step 180", "never a step" and the 200 tries after which one gives up as a
    finding."""
    planned = plan("stages.rl.checkpoint_every=1")
    study = found(planned, seeds=2, failures_per_node_day=1e6, price=1.0)
    text = "\n".join(study_lines(study, planned))
    assert "ends      0 of 2 runs; otherwise nodes fail again and again" in text
    assert "never" not in text and "200" not in text and "cost" not in text and "every 1 " not in text
    assert (study.ended, study.restarts) == (0, 0)
    json.dumps(study.to_json(), allow_nan=False)


def test_a_run_without_room_is_not_simulated_without_a_word() -> None:
    planned = plan("cluster.nodes=4", engine="local", tensor_parallel=1)
    first = next(study_lines(found(planned, seeds=1, steps=1), planned))
    assert first.startswith("fits      no: rollout takes ") and first.endswith("simulated as if there were room")


@pytest.mark.parametrize(("seconds", "workers"), [(0.5, 4), (90.0, 1)])
def test_scores_take_as_long_in_the_plan_as_in_the_simulation(tmp_path: Path, seconds: float, workers: int) -> None:
    """Locks out a table that hears of one option and a simulation that hears of another, and a queue that only one sees."""
    (tmp_path / "r.py").write_text("")
    reward = f"reward={{kind: function, path: {tmp_path / 'r.py'}, pool: {{workers: {workers}}}}}"
    recipe = load_recipe(["llama3-70b-8n8g"], [reward])
    alike = load_machine(constants=["runs.score_spread=1e-6"])
    planned = plan_of(recipe, alike, engine="vllm", tensor_parallel=8, scoring_s=seconds)
    study = found(planned, seeds=1, steps=6, failures_per_node_day=0.0)
    assert study.phases["score"] * study.seconds.median / 6 == pytest.approx(planned.step.scoring, rel=0.1)
    ruled = plan_of(load_recipe(["llama3-70b-8n8g"], []), alike, engine="vllm", tensor_parallel=8)
    assert ruled.step.scoring == found(ruled, seeds=1, steps=2).phases["score"] == 0.0


def test_4096_gpus_are_simulated() -> None:
    """With 4,096 sequences a step, split and one step off policy; most steps are drawn."""
    large = plan(
        "stages.rl.prompts_per_step=256", "cluster.nodes=256", rollout_nodes=256, one_step_off=True, tensor_parallel=8
    )
    study = found(large, seeds=1)
    assert large.layout.gpus == 4096 and study.detailed_steps < study.scenario.steps
    assert study.seconds.median < math.inf


def test_lengths_and_scoring_come_from_a_run(tmp_path: Path) -> None:
    """Both arms of the run are compared, and scores take as long as they took."""
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for arm, tokens, latents in (("latent", 300, 30), ("discrete", 500, 0)):
        line = {"arm": arm, "tokens": tokens, "latent_steps": latents, "prompt_ids": [1] * 700}
        (folder / f"{arm}-step-10.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    (tmp_path / "metrics.jsonl").write_text('{"stage": "reward", "samples": 10, "scoring_s": 45.0}\n')
    (tmp_path / "r.py").write_text("")
    run = read(tmp_path)
    planned = plan(f"reward={{kind: function, path: {tmp_path / 'r.py'}}}", measured=run)
    work = planned.work
    assert (work.prompt_tokens, work.lengths.mean, work.lengths.spread, work.scoring_s) == (700, 330, 0, 4.5)
    assert work.latent_share == pytest.approx(1 / 11)
    study = found(planned, run, seeds=1, steps=2)
    own, other = study.reasoning
    assert (own.tokens, own.latent_steps, other.tokens) == (300, 30, 500)
    assert study.scenario.prompt_tokens == 700
    latency = study.scenario.scoring.latency
    assert latency.mean_s == 4.5  # type: ignore[attr-defined]
    assert study.utilisation["score"] > 0


def test_a_run_that_kept_no_rollouts_gives_its_means(tmp_path: Path) -> None:
    lines = [{"stage": "rl", "arm": "latent", "tokens_mean": 90.0 + 20 * n, "latent_steps_mean": 25.0} for n in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut sho')
    (tmp_path / "recipe.json").write_text('{"rollout": {"max_new_tokens": 300}}')
    run = read(tmp_path)
    study = found(plan(measured=run), run, seeds=1, steps=2)
    assert study.reasoning[0].tokens == pytest.approx(100, rel=0.05)
    assert study.reasoning[0].latent_steps == pytest.approx(25, rel=0.05)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds no lengths"),
        ({"metrics.jsonl": '{"stage": "traces"}\n', "rollouts/latent-step-1.jsonl": ""}, "holds no lengths"),
        ({"rollouts/latent-step-1.jsonl": "x\n{}\n"}, "latent-step-1.jsonl:1 is no JSON"),
    ],
)
def test_runs_without_lengths_are_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    (tmp_path / "rollouts").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(LaunchError, match=words):
        read(tmp_path)


def test_what_cannot_be_simulated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="KV memory is too small"):
        found(plan(tensor_parallel=1), seeds=1)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "rl", "arm": "discrete", "tokens_mean": 90.0}\n')
    with pytest.raises(LaunchError, match="the recipe's arms are latent"):
        plan(measured=read(tmp_path))
    with pytest.raises(RecipeError, match="needed 0 or more"):
        found(plan(), seeds=1, failures_per_node_day=-1.0)


def test_the_time_line_reaches_the_first_refresh_and_checkpoint() -> None:
    """Locks out charts that end before anything but rollouts and updates has come."""
    planned = plan(rollout_nodes=4, one_step_off=True)
    every = planned.work.refresh_every
    spans = found(planned, seeds=1, steps=20).spans
    phases = {(span.phase, span.step) for span in spans}
    assert {("refresh", every), ("checkpoint", 6), ("update", every + 2), ("rollout", every + 3)} <= phases
    assert len({span.step for span in found(plan("stages.rl.checkpoint_every=150"), seeds=1).spans}) < 80
