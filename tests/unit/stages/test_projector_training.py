"""Lite rows, alignment, and the held-out measure of what latents say."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lrscale.config.recipe import Recipe
from lrscale.config.stages import TracesConfig
from lrscale.parallel.engine import NonFiniteError
from lrscale.records import Trace
from lrscale.stages.alignment import align_projector, collect_pairs, oracle_latents, pieces
from lrscale.stages.heldout import heldout_losses, ratio_with_error
from lrscale.stages.lite_rows import LiteRow, lite_rows, split_heldout
from lrscale.stages.parts import Parts, build_parts
from lrscale.stages.projector_sft import Training, train_projector, warn_about_scale
from tests.unit.latent.tiny_models import live_policy

TEXT = r"Dan is at the mill. Eve is at the port. Dan goes to the inn. All is well. \boxed{No}"


@pytest.fixture(scope="module")
def policy():
    return live_policy()


def _traces(policy, count: int = 6) -> list[Trace]:
    return [
        Trace(f"p{i // 2}", tuple(policy.encode(f"Story {i}?")), tuple(policy.encode(TEXT)), 1.0) for i in range(count)
    ]


def _rows(policy, **config: object) -> list[LiteRow]:
    return lite_rows(_traces(policy), policy.detector, TracesConfig(**config), 0, "lite")


def test_rows_know_which_sentence_each_marker_stands_for(policy):
    """Alignment would regress to another sentence's embeddings if the two lists slipped."""
    rows = _rows(policy, replace_ratios=(0.25, 0.75))
    assert len(rows) == 12
    for row in rows:
        assert len(row.spans) == len(row.replaced) >= 1
        assert tuple(policy.detector.find(row.ids)) == row.spans
        for span, sentence in zip(row.spans, row.replaced, strict=True):
            assert span.steps == min(max(int(0.2 * len(sentence)), 1), 5)
    assert rows == _rows(policy, replace_ratios=(0.25, 0.75)), "the same rows in every attempt of a run"


def test_markers_in_the_prompt_stand_for_no_sentence(policy):
    prompt = (*policy.encode("Think"), *policy.marker_ids(2), *policy.encode("? "))
    trace = Trace("p", prompt, tuple(policy.encode(TEXT)), 1.0)
    row = lite_rows([trace], policy.detector, TracesConfig(replace_ratios=(0.3,)), 0, "x")[0]
    assert row.replaced[0] == () and row.replaced[1]
    assert len(collect_pairs(policy, [row], 10_000)[0]) == 0


def test_no_prompt_is_on_both_sides_of_the_split(policy):
    """Held-out loss on a prompt that was trained on would flatter the projector."""
    train, heldout = split_heldout(_traces(policy, 20), 0.3, seed=1)
    assert {trace.prompt_id for trace in train}.isdisjoint(trace.prompt_id for trace in heldout)
    assert len(train) + len(heldout) == 20 and len({trace.prompt_id for trace in heldout}) == 3
    assert split_heldout(_traces(policy, 2), 0.1, seed=1)[1] == []


@pytest.mark.parametrize(("length", "count"), [(1, 1), (5, 5), (7, 3), (29, 5), (2, 5)])
def test_pieces_are_never_empty_and_nearly_equal(length: int, count: int):
    """A mean over no tokens is not a number."""
    cut = pieces(length, count)
    assert len(cut) == count
    assert all(0 <= start < stop <= length for start, stop in cut)
    if count <= length:
        assert cut[0][0] == 0 and cut[-1][1] == length
        assert all(a[1] == b[0] for a, b in pairwise(cut))
        sizes = [stop - start for start, stop in cut]
        assert max(sizes) - min(sizes) <= 1


def test_pairs_are_what_the_projector_reads(policy):
    """Off by one position, the projector would learn to echo the token after the marker."""
    rows = _rows(policy, replace_ratios=(0.5,))[:3]
    for row in rows:
        ids_1T = torch.tensor([row.ids])
        expanded = policy.expand(ids_1T, torch.ones_like(ids_1T))
        inputs_LH = policy.projector_inputs(ids_1T, torch.ones_like(ids_1T), [expanded.latents[0]])[0]
        assert torch.allclose(policy.projector(inputs_LH), expanded.latents[0], atol=1e-9)


def test_own_rounds_read_what_the_policy_makes_of_its_own_latents(policy):
    """Behind the true latents again, a second round would show the projector nothing that rollouts will."""
    row = next(row for row in _rows(policy) if row.spans[0].steps > 1)
    ids_BT = torch.tensor([row.ids])
    own_BT = policy.expand(ids_BT, torch.ones_like(ids_BT)).latents
    expected = policy.projector_inputs(ids_BT, torch.ones_like(ids_BT), own_BT)[0]
    true, own = (collect_pairs(policy, [row], 10_000, own=own) for own in (False, True))
    assert torch.equal(own.targets_MH, true.targets_MH)
    assert torch.allclose(own.inputs_MH, expected, atol=1e-6)
    assert torch.allclose(own.inputs_MH[0], true.inputs_MH[0], atol=1e-6)  # before the first latent nothing differs
    assert not torch.allclose(own.inputs_MH[1], true.inputs_MH[1], atol=1e-2)


def test_oracle_latents_are_mean_embeddings_of_the_replaced_sentence(policy):
    row = _rows(policy, replace_ratios=(0.25,))[0]
    embedding = policy.model.get_input_embeddings().weight
    sentence, steps = row.replaced[0], row.spans[0].steps
    (oracle_LH,) = oracle_latents(policy, [row])
    assert oracle_LH.shape == (steps, embedding.shape[1])
    first = pieces(len(sentence), steps)[0]
    assert torch.allclose(oracle_LH[0], embedding[list(sentence[slice(*first)])].mean(0))
    inputs_NH, targets_NH, place, names = collect_pairs(policy, [row], 10_000)
    assert inputs_NH.shape == targets_NH.shape and torch.equal(targets_NH, oracle_LH)
    assert names == [row.prompt_id] * steps and place == {index: index for index in range(steps)}


def test_heldout_losses_are_those_of_the_rows_tokens(policy):
    """Checked against one row at a time; batches of any size agree."""
    rows = _rows(policy, replace_ratios=(0.5,))
    losses = heldout_losses(policy, rows, 10_000)
    assert losses is not None and losses["rows"] == 6
    total, tokens = 0.0, 0
    for row in rows:
        ids_1T = torch.tensor([row.ids])
        logprobs = policy.expand(ids_1T, torch.ones_like(ids_1T)).logits_BTV.log_softmax(-1)[0]
        for t in range(row.spans[0].position + 1, len(row.ids)):
            total -= float(logprobs[t - 1, row.ids[t]].detach())
            tokens += 1
    assert losses["loss_real"] == pytest.approx(total / tokens, abs=1e-9)
    again = heldout_losses(policy, rows, 1)
    assert again is not None and again["loss_zero"] == pytest.approx(losses["loss_zero"], abs=1e-9)
    assert losses["real_minus_zero"] == pytest.approx(losses["loss_real"] - losses["loss_zero"], abs=1e-12)
    assert abs(losses["real_minus_zero"]) > 1e-4, "the control: live latents must change the loss"
    assert heldout_losses(policy, rows[:1], 10_000) is None


def test_standard_error_counts_prompts_not_rows():
    """Ten copies of a row are one observation: taking rows for independent shrank the error by sqrt(10)."""
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(40)]
    names = [f"p{i}" for i in range(40)]
    ones = torch.ones(40, dtype=torch.float64)
    ratio, error = ratio_with_error(torch.tensor(values, dtype=torch.float64), ones, names)
    expected = torch.tensor(values, dtype=torch.float64)
    assert ratio == pytest.approx(float(expected.mean()))
    assert error == pytest.approx(float(expected.std()) / 40**0.5)
    copied = torch.tensor(values * 10, dtype=torch.float64)
    assert ratio_with_error(copied, torch.ones(400, dtype=torch.float64), names * 10)[1] == pytest.approx(error)
    # Locks out rows of one prompt that pass for certainty: an error of 0 would make any difference a finding.
    assert ratio_with_error(copied[:3], torch.ones(3, dtype=torch.float64), ["a"] * 3)[1] is None


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    recipe = {"projector": {"kind": "normalised"}, "parallel": {"threads": 1}}
    recipe["stages"] = {"projector_sft": {"alignment": {"epochs": 1}}}
    made = build_parts(Recipe.model_validate(recipe), tmp_path)
    yield made
    made.log.close()


def _broken_gradient(parts: Parts) -> None:
    """A finite loss with a gradient that is not: what overflow in a backward pass looks like."""
    next(parts.policy.projector.parameters()).register_hook(lambda gradient: gradient * float("nan"))


def test_a_gradient_that_is_not_finite_names_training_step_and_prompts(parts: Parts):
    """`gradient norm is nan` alone sends the reader through every trace of the run."""
    rows = _rows(parts.policy)
    _broken_gradient(parts)
    named = r"refresh 2 of latent \(RL step 24\), step 1: .*gradient norm.*prompts p\d"
    with pytest.raises(NonFiniteError, match=named):
        train_projector(parts, rows, Training(1e-4, 1, arm="latent", refresh=2, step=24))
    with pytest.raises(NonFiniteError, match=r"projector SFT, step 1: .*prompts p\d"):
        train_projector(parts, rows, Training(1e-4, 1))
    with pytest.raises(NonFiniteError, match=r"alignment, step 1 \(epoch 1\): .*prompts p\d"):
        align_projector(parts, rows, [])


def test_alignment_of_one_pair_is_refused(parts: Parts):
    """The variance of one target is NaN, and so would be every loss."""
    row = next(row for row in _rows(parts.policy, max_steps=1) if len(row.spans) == 1)
    with pytest.raises(ValueError, match=r"1 latent steps .* needed at least 2"):
        align_projector(parts, [row], [])


def test_the_scale_is_warned_about_when_it_leaves_not_at_every_step(caplog: pytest.LogCaptureFixture):
    told = False
    for scale in (1.0, 50.0, 60.0, None, 70.0, 1.0, 0.01):
        told = warn_about_scale(scale, "RL latent", told=told)
    assert [record.getMessage().split()[4] for record in caplog.records] == ["50", "0.01"]
