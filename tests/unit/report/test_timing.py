"""Phases add up; progress is a bar on a terminal and plain lines elsewhere."""

import io
import time

import pytest
from rich.console import Console

from lrscale.report.timing import PhaseTimer, StageProgress, duration, step_line


def test_inner_phase_is_not_counted_twice():
    """Locks out phases that add up to more than the step."""
    timer = PhaseTimer("rollout", "refresh")
    with timer.phase("rollout"):
        time.sleep(0.02)
        with timer.phase("score"):
            time.sleep(0.03)
    seconds = timer.take()
    assert seconds["rollout_s"] >= 0.015 and seconds["score_s"] >= 0.025
    assert seconds["rollout_s"] + seconds["score_s"] <= seconds["step_s"] + 1e-5
    assert seconds["refresh_s"] == 0.0
    assert seconds["score_cpu_s"] < 0.02
    assert all(key.endswith("_s") for key in seconds), "every key must be left out of bit-equality"


def test_take_starts_afresh_and_a_raising_phase_is_closed():
    """Locks out one step's seconds leaking into the next."""
    timer = PhaseTimer("rollout")
    with pytest.raises(RuntimeError), timer.phase("rollout"):
        time.sleep(0.02)
        raise RuntimeError
    assert timer.take()["rollout_s"] >= 0.015
    time.sleep(0.01)
    assert timer.take()["rollout_s"] == 0.0


def test_device_is_waited_for_at_both_ends():
    """Locks out kernels of one phase being charged to the next."""
    calls = []
    timer = PhaseTimer(synchronise=lambda: calls.append(1))
    with timer.phase("update"):
        assert len(calls) == 1
    assert len(calls) == 2


def _run_stage(console: Console) -> None:
    with StageProgress("rl latent", 3, done=1, console=console) as progress:
        for step in (2, 3):
            with progress.inner("rollout", 4) as samples:
                for _ in range(4):
                    samples.advance()
            progress.line(f"step {step} [bold]not markup[/bold]")
            progress.advance(note="accuracy 0.5")


def test_no_bar_and_no_control_codes_off_a_terminal():
    """Locks out log files full of cursor movements."""
    out = io.StringIO()
    _run_stage(Console(file=out, force_terminal=False, width=40))
    text = out.getvalue()
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "rl latent: 1/3 steps"
    assert lines[1:3] == ["step 2 [bold]not markup[/bold]", "step 3 [bold]not markup[/bold]"]
    assert lines[-1].startswith("rl latent: 3/3 steps") and "accuracy 0.5" in lines[-1]


def test_slow_stage_speaks_off_a_terminal():
    """Locks out hours of silence in a SLURM log."""
    out = io.StringIO()
    with StageProgress("traces", 3, unit="prompts", console=Console(file=out, width=99)) as progress:
        progress.plain_every_s = 0.0
        for _ in range(3):
            progress.advance()
    assert "traces: 1/3 prompts" in out.getvalue() and " left" in out.getvalue()


def test_bar_on_a_terminal():
    out = io.StringIO()
    _run_stage(Console(file=out, force_terminal=True, width=100))
    assert "3/3" in out.getvalue() and "rollout" in out.getvalue() and "[bold]not markup[/bold]" in out.getvalue()


def test_disabled_progress_is_silent():
    """Locks out every rank printing the same lines."""
    out = io.StringIO()
    with StageProgress("traces", 2, console=Console(file=out, force_terminal=True), enabled=False) as progress:
        progress.advance()
        progress.line("x")
        with progress.inner("y", 2) as inner:
            inner.advance()
    assert out.getvalue() == ""


def test_step_line_and_duration():
    line = step_line(
        {"stage": "rl", "arm": "latent", "step": 7, "reward_mean": 0.5, "accuracy": 0.5, "tokens_mean": 61.25,
         "latent_steps_mean": 8.0, "rollout_s": 1.2, "rollout_cpu_s": 1.1, "update_s": 0.9, "score_s": 0.0, "step_s": 2.2},
        total=160,
    )  # fmt: skip
    expected = (
        "latent   7/160  reward 0.500  accuracy 0.500  tokens 61.2  latent steps 8.00  | rollout 1.20 s, update 0.90 s"
    )
    assert line == expected
    assert [duration(s) for s in (8.44, 59.99, 185, 7620)] == ["8.4 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]
