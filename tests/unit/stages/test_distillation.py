"""Hidden states behind markers against those behind the words that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrscale.config.recipe import Recipe
from lrscale.config.stages import TracesConfig
from lrscale.report.metrics import of_stage, read_metrics
from lrscale.stages.batching import padded
from lrscale.stages.distillation import count_places, distillation_loss, words_again
from lrscale.stages.lite_rows import LiteRow, lite_rows
from lrscale.stages.parts import build_parts
from lrscale.stages.projector_sft import Training, train_projector
from tests.unit.latent.tiny_models import live_policy
from tests.unit.stages.test_projector_training import _rows, _traces


@pytest.fixture(scope="module")
def policy():
    return live_policy()


def _with_all_ratios(policy) -> list[LiteRow]:
    """Some markers alone, some side by side, one at the very end of what is replaced."""
    config = TracesConfig(replace_ratios=(0.25, 0.5, 0.75, 1.0))
    return lite_rows(_traces(policy), policy.detector, config, 0, "lite")


def test_rows_get_their_own_words_back(policy):
    """A place that slips by one would pull the model towards the state of another word."""
    rows = _with_all_ratios(policy)
    wholes = {(*trace.prompt_ids, *trace.completion_ids) for trace in _traces(policy)}
    found = 0
    for row in rows:
        ids, places = words_again(row, policy.detector)
        assert ids in wholes
        for ours, theirs in places:
            assert row.ids[ours] == ids[theirs]
            assert ours - 1 in {span.position for span in row.spans}
        last_ours, last_theirs = places[-1]
        assert row.ids[last_ours:] == ids[last_theirs:]
        found += len(places)
    assert found == count_places(rows, policy.detector) > 0
    side_by_side = [row for row in rows if len(row.spans) > len(words_again(row, policy.detector)[1])]
    assert side_by_side, "the rows were to hold markers without a token of their own behind them"


def test_the_loss_is_that_of_one_row_at_a_time(policy):
    rows = _with_all_ratios(policy)[:6]
    total = 0.0
    for row in rows:
        words, places = words_again(row, policy.detector)
        ours, theirs = (policy.expand(*padded([ids], policy.device)).hidden_BTH[0] for ids in (row.ids, words))
        for a, b in places:
            total += float(((ours[a] - theirs[b]).square().sum() / theirs[b].square().sum()).detach())
    hidden_BTH = policy.expand(*padded([row.ids for row in rows], policy.device)).hidden_BTH
    loss = distillation_loss(policy, rows, hidden_BTH, 2.0)
    assert float(loss.detach()) == pytest.approx(total / 2, rel=1e-5)
    assert loss.requires_grad and total > 1e-3
    nothing = [LiteRow("x", ids=(3, 4), spans=(), replaced=())]
    assert float(distillation_loss(policy, nothing, hidden_BTH[:1, :2], 1.0).detach()) == 0.0


def test_training_with_it_brings_the_states_together(tmp_path: Path):
    stages = {"projector_sft": {"distillation": 10.0, "max_grad_norm": 1.0, "schedule": {"kind": "constant"}}}
    recipe = {"projector": {"kind": "normalised"}, "parallel": {"threads": 1}, "stages": stages}
    parts = build_parts(Recipe.model_validate(recipe), tmp_path)
    train_projector(parts, _rows(parts.policy), Training(1e-3, 12))
    parts.log.close()
    distances = [line["distillation"] for line in of_stage(read_metrics(tmp_path / "metrics.jsonl"), "projector_sft")]
    assert len(distances) == 12 and distances[-1] < 0.8 * distances[0], distances
    assert torch.isfinite(torch.tensor(distances)).all()
