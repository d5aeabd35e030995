"""The closing table: right figures, and no claim that the intervals do not carry."""

import io
import json
import math
import random

import pytest
from rich.console import Console

from lrscale.report.phases import stage_times
from lrscale.report.runs import RunNotFound, load_runs
from lrscale.report.summary import (
    gain_sentence,
    gains_kept,
    heldout_losses,
    heldout_sentence,
    ratio_interval,
    summarise,
)
from lrscale.report.table import (
    across_runs_cells,
    heldout_cells,
    mean_and_range,
    plain_table,
    print_summary,
    summary_cells,
)
from tests.unit.report.synthetic_run import ARMS, write_run


def _run(path, accuracies, prompts=512):
    """A finished run with the given arms: {arm: (before, after)}."""
    path.mkdir(parents=True)
    lines = []
    for arm, values in accuracies.items():
        for when, accuracy in zip(("before", "after"), values, strict=True):
            lines.append(
                {"stage": "evaluate", "arm": arm, "step": 0, "when": when, "prompts": prompts, "accuracy": accuracy,
                 "tokens_mean": 50.0, "latent_steps_mean": 5.0}
            )  # fmt: skip
        lines.append({"stage": "rl", "arm": arm, "step": 3, "train_tokens_total": 1000 if arm == "discrete" else 500})
        lines.append({"stage": "arm", "arm": arm, "step": 3, "minutes": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_figures_of_an_arm(full_run):
    """Locks out a `during` evaluation taken for the one before or after, and the wrong running total."""
    arms = summarise(load_runs([full_run]))
    assert [arm.arm for arm in arms] == list(ARMS)
    lines = [json.loads(line) for line in (full_run / "metrics.jsonl").read_text().splitlines()]
    for arm in arms:
        mine = [line for line in lines if line.get("arm") == arm.arm]
        assert arm.before.accuracy == next(line["accuracy"] for line in mine if line.get("when") == "before")
        assert arm.after.accuracy == next(line["accuracy"] for line in mine if line.get("when") == "after")
        assert arm.train_tokens == max(line.get("train_tokens_total", 0) for line in mine)
        assert arm.rl_steps == 60 and arm.finished


def test_share_is_counted_from_the_discrete_arms_base(tmp_path):
    """Locks out an arm that starts low and "keeps" 200 % by recovering."""
    run = _run(tmp_path / "run", {"latent": (0.40, 0.80), "discrete": (0.70, 0.90)}, prompts=4000)
    (kept,) = gains_kept(summarise(load_runs([run])))
    assert kept.share == pytest.approx(0.5)
    assert kept.share_low < 0.5 < kept.share_high
    assert kept.token_ratio == 0.5
    assert "keeps 50 %" in gain_sentence(kept) and "0.50 times" in gain_sentence(kept)


@pytest.mark.parametrize(("after", "why"), [(0.72, "includes 0"), (0.50, "gained nothing")])
def test_share_is_not_defined_where_discrete_rl_gained_nothing_sure(tmp_path, after, why):
    """Locks out a proud ratio over a denominator that may be 0."""
    run = _run(tmp_path / "run", {"latent": (0.60, 0.75), "discrete": (0.70, after)})
    (kept,) = gains_kept(summarise(load_runs([run])))
    assert kept.share is None
    assert "not defined" in gain_sentence(kept) and why in gain_sentence(kept)


def test_one_reason_is_said_once_for_all_arms(tmp_path):
    """Locks out three sentences that differ in the arm's name only."""
    arms = dict.fromkeys(("latent", "zero_latent", "shuffled_latent"), (0.6, 0.75))
    run = _run(tmp_path / "run", {"discrete": (0.70, 0.71), **arms})
    out = io.StringIO()
    print_summary([run], Console(file=out, width=300))
    assert out.getvalue().count("is not defined") == 1
    assert "shuffled" in out.getvalue() and out.getvalue().count("0.50 times") == 3


def test_share_below_the_base_is_called_none(tmp_path):
    run = _run(tmp_path / "run", {"zero_latent": (0.60, 0.65), "discrete": (0.70, 0.90)})
    (kept,) = gains_kept(summarise(load_runs([run])))
    assert "keeps none" in gain_sentence(kept) and "below the base" in gain_sentence(kept)


def test_ratio_interval_covers():
    """Locks out a wrong sign of the covariance: about 95 % of simulated intervals hold the true ratio."""
    rng = random.Random(0)
    base, discrete, latent, error = 0.7, 0.9, 0.82, 0.02
    hits = 0
    for _ in range(2000):
        b, d, a = (rng.gauss(mean, error) for mean in (base, discrete, latent))
        interval = ratio_interval((a - b, 2 * error**2), (d - b, 2 * error**2), error**2)
        hits += interval is not None and interval[0] <= (latent - base) / (discrete - base) <= interval[1]
    assert 0.935 <= hits / 2000 <= 0.965
    assert ratio_interval((0.1, 1e-4), (0.01, 1e-4), 0.0) is None


def test_discrete_arm_of_another_run_is_used_only_where_it_is_comparable(tmp_path):
    """Locks out a gain measured on one task and a share claimed on another."""
    one = _run(tmp_path / "one", {"latent": (0.6, 0.8)})
    two = _run(tmp_path / "two", {"discrete": (0.7, 0.9)})
    assert "(of run two)" in gain_sentence(gains_kept(summarise(load_runs([one, two])))[0])
    (two / "recipe.json").write_text('{"task": {"kind": "jsonl"}}')
    assert gains_kept(summarise(load_runs([one, two]))) == []


def test_heldout_sentence_follows_the_paired_error(full_run):
    """Locks out "better" where the difference is within its error."""
    first = heldout_losses(load_runs([full_run])[0])[0]
    assert first.arm is None and "better than shuffled" in heldout_sentence(first)
    for difference, words in [(-0.01, "not told apart from"), (0.3, "worse than"), (None, "no measurement against")]:
        sentence = heldout_sentence(_with(first, difference))
        assert f"{words} shuffled latents" in sentence


def test_one_heldout_prompt_gives_no_verdict(tmp_path):
    """Locks out "real latents are better" from rows of one prompt, whose error was once written as 0."""
    run = tmp_path / "run"
    run.mkdir()
    line = {"stage": "heldout", "arm": None, "refresh": 0, "step": 1, "rows": 3, "loss_real": 1.0}
    for error in (None, 0.0):
        errors = {"real_minus_zero": -0.5, "real_minus_zero_se": error, "real_minus_shuffled": -0.5}
        (run / "metrics.jsonl").write_text(json.dumps(line | errors | {"real_minus_shuffled_se": error}) + "\n")
        (loaded,) = load_runs([run])
        sentence = heldout_sentence(heldout_losses(loaded)[0])
        assert sentence.count("no error known (one prompt)") == 2 and "better" not in sentence
        assert "no error known (one prompt)" in plain_table(heldout_cells(loaded))


def _with(heldout, difference):
    import dataclasses

    return dataclasses.replace(heldout, real_minus_shuffled=difference)


def test_phases_add_up_and_refreshes_are_counted_once(full_run):
    """Locks out an arm's refresh steps added to the first projector SFT, and CPU keys taken for phases."""
    run = load_runs([full_run])[0]
    times = {time.name: time for time in stage_times(run)}
    rl = run.lines("rl", arm="latent")
    expected = sum(line["step_s"] for line in rl) + sum(
        line["evaluate_s"] for line in run.lines("evaluate", arm="latent")
    )
    assert times["latent"].total_s == pytest.approx(expected)
    assert times["latent"].seconds["refresh"] == pytest.approx(sum(line["refresh_s"] for line in rl))
    assert set(times["latent"].seconds) == {"rollout", "score", "update", "refresh", "evaluate", "other"}
    assert times["projector SFT"].total_s == pytest.approx(
        sum(line["step_s"] for line in run.lines("projector_sft", arm=None))
    )


def test_closing_table_off_a_terminal_is_plain(full_run):
    """Locks out boxes, colours and wrapped lines in logs."""
    out = io.StringIO()
    print_summary([full_run], Console(file=out, width=40))
    text = out.getvalue()
    assert "\x1b" not in text and "│" not in text
    row = next(line for line in text.splitlines() if line.startswith("latent"))
    assert "61.9 [57.6, 66.0]" in row and "52.0 → 33.0" in row and "6.2 → 7.9" in row
    assert "arm keeps" in text and "Held-out loss" in text


def test_closing_table_on_a_terminal(full_run):
    out = io.StringIO()
    print_summary([full_run], Console(file=out, force_terminal=True, width=140))
    assert "│" in out.getvalue() and "shuffled latent" in out.getvalue()


def test_unfinished_arm_says_how_far_it_came(tmp_path):
    """Locks out a blank, or a `during` figure passed off as the result."""
    run = write_run(tmp_path / "half", arms=("discrete", "latent"), stop_after="latent")
    cells = summary_cells(summarise(load_runs([run])))
    assert cells.rows[1][:3] == ("latent", "61.9 [57.6, 66.0]", "step 30")
    assert "latent" in plain_table(cells)
    out = io.StringIO()
    print_summary([write_run(tmp_path / "early", stop_after="traces")], Console(file=out))
    assert "no arm has started" in out.getvalue()


def test_several_runs_give_mean_and_range(tmp_path):
    """Locks out one seed's figure standing for all."""
    one = _run(tmp_path / "one", {"latent": (0.6, 0.80), "discrete": (0.7, 0.90)})
    two = _run(tmp_path / "two", {"latent": (0.6, 0.70), "discrete": (0.7, 0.71)})
    arms = summarise(load_runs([one, two]))
    cells = across_runs_cells(arms, gains_kept(arms))
    assert cells.rows[0][:4] == ("latent", "2", "60.0 (60.0 to 60.0)", "75.0 (70.0 to 80.0)")
    assert cells.rows[0][-1] == "50.0 (50.0 to 50.0), 1 not defined"
    assert across_runs_cells(summarise(load_runs([one])), []) is None
    assert mean_and_range([]) == "–"  # noqa: RUF001


def test_run_not_found_says_what_to_do(tmp_path, full_run):
    """Locks out a traceback, or an empty report, for a mistyped path."""
    with pytest.raises(RunNotFound, match=r"does not exist.*Runs in .*: tiny-cpu"):
        load_runs([full_run.parent / "tinycpu"])
    with pytest.raises(RunNotFound, match=r"neither recipe\.json nor metrics\.jsonl.*lrscale launch"):
        load_runs([tmp_path])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunNotFound, match="is a file"):
        load_runs([tmp_path / "file"])
    with pytest.raises(RunNotFound, match="no run directory given"):
        load_runs([])


def test_runs_are_read_once_and_labels_tell_them_apart(tmp_path):
    one = _run(tmp_path / "a" / "run", {"latent": (0.6, 0.8)})
    two = _run(tmp_path / "b" / "run", {"latent": (0.6, 0.8)})
    assert [run.label for run in load_runs([one, two, one])] == ["a/run", "b/run"]


def test_accuracy_of_one_has_an_error():
    """Locks out a certain ratio from an evaluation that happened to be perfect."""
    from lrscale.report.summary import evaluation

    item = evaluation({"stage": "evaluate", "step": 0, "prompts": 50, "accuracy": 1.0})
    assert item.standard_error > 0.0 and item.high == 1.0 and not math.isnan(item.low)
