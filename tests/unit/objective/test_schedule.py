"""The learning rate at its corners."""

import pytest

from lrscale.config.optimisation import ScheduleConfig
from lrscale.objective import learning_rate_at


def rates(schedule, total):
    return [learning_rate_at(schedule, peak=2.0, step=step, total_steps=total) for step in range(total)]


def test_cosine_with_warmup():
    """Locks out a first step at rate 0, a peak that is never reached, and a last step short of the final share."""
    values = rates(ScheduleConfig(kind="cosine", warmup_share=0.2, final_share=0.1), 20)
    assert values[0] == pytest.approx(2.0 / 5) and values[4] == pytest.approx(2.0)
    assert values[-1] == pytest.approx(0.2)
    assert values[:5] == sorted(values[:5]) and values[4:] == sorted(values[4:], reverse=True)
    assert values[4] - values[5] < values[11] - values[12]  # a cosine, not a line


def test_constant_and_short_runs():
    """Locks out a division by zero when a stage has one or two steps."""
    assert rates(ScheduleConfig(), 3) == [2.0, 2.0, 2.0]
    assert rates(ScheduleConfig(kind="cosine"), 1) == [2.0]
    assert rates(ScheduleConfig(kind="cosine", warmup_share=0.5), 2)[1] == 2.0
    assert all(0 < rate < 2.0 for rate in rates(ScheduleConfig(kind="cosine", warmup_share=1.0), 5))


def test_step_out_of_range():
    with pytest.raises(ValueError, match="0 to 2"):
        learning_rate_at(ScheduleConfig(), peak=1.0, step=3, total_steps=3)
