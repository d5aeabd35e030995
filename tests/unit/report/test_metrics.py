"""metrics.jsonl: nothing half-written survives, nothing non-finite gets in, resuming cuts exactly."""

import json
import math

import pytest

from lrscale.report.metrics import MetricsDamaged, MetricsLog, of_stage, read_metrics, wilson_interval, without_times


def test_lines_come_back_as_written(tmp_path):
    """Locks out floats that lose bits on the way to the file: bit-equality of resumed runs is read from here."""
    lines = [{"stage": "rl", "step": k, "loss": 0.1 + 1e-17 * k + k / 3} for k in range(5)]
    with MetricsLog(tmp_path / "deep" / "metrics.jsonl") as log:
        for line in lines:
            log.append(line)
    assert read_metrics(tmp_path / "deep" / "metrics.jsonl") == lines


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_written_last_line_is_dropped_and_overwritten(tmp_path, cut):
    """Locks out a crash in mid-write gluing two lines together."""
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"stage": "rl", "step": 1, "loss": 0.5})
        log.append({"stage": "rl", "step": 2, "loss": 0.25})
    path.write_bytes(path.read_bytes()[:-1][:-cut])
    assert [line["step"] for line in read_metrics(path)] == [1]
    with MetricsLog(path) as log:
        assert log.dropped_bytes > 0
        log.append({"stage": "rl", "step": 3})
    assert [line["step"] for line in read_metrics(path)] == [1, 3]


def test_whole_last_line_without_newline_is_kept(tmp_path):
    """Locks out losing a step that was written but for its newline."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage":"rl","step":1}\n{"stage":"rl","step":2}')
    assert len(read_metrics(path)) == 2
    with MetricsLog(path) as log:
        log.append({"stage": "rl", "step": 3})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_zero_filled_tail_is_dropped(tmp_path):
    """Locks out a power cut's block of zero bytes stopping every later start."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"stage":"rl","step":1}\n' + b"\0" * 64)
    assert len(read_metrics(path)) == 1


def test_damage_in_the_middle_is_named(tmp_path):
    """Locks out silently skipping a line that no crash explains."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage":"rl","step":1}\nhello\n{"stage":"rl","step":2}\n')
    with pytest.raises(MetricsDamaged, match=r"metrics\.jsonl:2"):
        read_metrics(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused_with_their_key(tmp_path, value):
    """Locks out NaN written as invalid JSON, or as a null nobody notices."""
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        with pytest.raises(ValueError, match=r"parts\.kl\[1\]"):
            log.append({"stage": "rl", "step": 1, "parts": {"kl": [0.0, value]}})
        assert log.size_bytes == 0


def test_missing_stage_and_tensor_like_values_are_refused(tmp_path):
    """Locks out lines that the report cannot place, and half lines after a value JSON cannot hold."""
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        with pytest.raises(ValueError, match="'stage'"):
            log.append({"step": 1})
        with pytest.raises(ValueError, match="not tensors"):
            log.append({"stage": "rl", "step": 1, "loss": object()})
        assert log.size_bytes == 0


def test_truncate_goes_back_to_a_checkpoint(tmp_path):
    """Locks out a resumed run that keeps the lines of steps it will do again."""
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"stage": "rl", "step": 1})
        size = log.size_bytes
        log.append({"stage": "rl", "step": 2, "note": "é"})
    before = path.read_bytes()
    with MetricsLog(path) as log:
        with pytest.raises(ValueError, match="inside a line"):
            log.truncate(size + 3)
        with pytest.raises(ValueError, match="lines were lost"):
            log.truncate(10_000)
        log.truncate(size)
        log.append({"stage": "rl", "step": 2, "note": "é"})
    assert path.read_bytes() == before


def test_without_times_drops_clocks_only():
    """Locks out a clock in the bit-equality check, and a figure taken for a clock."""
    line = {"stage": "rl", "loss": 1.0, "rollout_s": 2.0, "minutes": 3.0, "cpu_minutes": 1, "latent_steps_mean": 4}
    assert without_times(line) == {"stage": "rl", "loss": 1.0, "latent_steps_mean": 4}


def test_of_stage_filters():
    lines = [
        {"stage": "rl", "step": 1, "arm": "latent"},
        {"stage": "rl", "step": 1, "arm": "discrete"},
        {"stage": "x", "step": 1},
    ]
    assert of_stage(lines, "rl", arm="latent") == lines[:1]


def test_wilson_interval_against_its_definition():
    """Locks out a wrong root: the ends p solve (share - p)^2 = z^2 p (1 - p) / n."""
    for successes, n in [(0, 10), (3, 10), (10, 10), (371, 512)]:
        low, high = wilson_interval(successes, n)
        share = successes / n
        assert 0.0 <= low <= share <= high <= 1.0
        for p in (low, high):
            assert (share - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / n, abs=1e-12)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="given 5 of 4"):
        wilson_interval(5, 4)


def test_file_is_plain_json_lines(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.append({"stage": "evaluate", "step": 0, "marker_histogram": {"0": 3}})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {
        "stage": "evaluate",
        "step": 0,
        "marker_histogram": {"0": 3},
    }
