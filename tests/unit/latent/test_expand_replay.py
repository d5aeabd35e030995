"""expand and replay against the plainest loop, in float64 and float32, with live and dead projectors."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from lrscale.latent.backbone import Backbone
from lrscale.latent.kv_cache import PieceLayer
from lrscale.records import SharedPrefix
from tests.unit.latent.plain_loop import plain_expand, plain_logprobs
from tests.unit.latent.tiny_models import ARCHITECTURES, live_policy, padded, random_rows

SPANS = [[(5, 3), (14, 1)], [], [(0, 2), (9, 5), (20, 1)], [(21, 4)], [(7, 1), (10, 2)]]
"""Different numbers of markers at different places; the first row starts late, the third at once."""


@pytest.fixture(params=ARCHITECTURES)
def policy(request):
    return live_policy(request.param)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_latents_equal_the_plain_loop(policy, side):
    rows = random_rows(policy, SPANS, 24)
    ids, mask = padded(rows, side)
    with torch.no_grad():
        expanded = policy.expand(ids, mask)
        replayed = policy.replay(ids, mask, expanded.latents)
        for row, values in enumerate(rows):
            logits, latents = plain_expand(policy, values)
            assert torch.allclose(expanded.latents[row], latents, atol=1e-9, rtol=0)
            for out in (expanded, replayed):
                assert torch.allclose(out.logits_BTV[row][mask[row].bool()], logits, atol=1e-9, rtol=0)


def test_zeroed_latents_fail_the_same_comparison(policy):
    """The control: were the projector dead, every test here would pass whatever expand does."""
    ids, mask = padded(random_rows(policy, SPANS, 24), "right")
    with torch.no_grad():
        expanded = policy.expand(ids, mask)
        zeroed = policy.replay(ids, mask, [latents * 0 for latents in expanded.latents])
    gap = (expanded.logits_BTV - zeroed.logits_BTV)[0][mask[0].bool()].abs().max().item()
    assert 0.1 < policy.scale_ratio(expanded.latents) < 10
    assert gap > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_projector_gradients_flow_through_the_whole_chain(policy, checkpointing):
    """Locks out latents detached between steps, cut caches, and checkpointing that drops the cache."""
    rows = random_rows(policy, SPANS, 24)
    ids, mask = padded(rows, "right")
    policy.model.requires_grad_(False)
    if checkpointing:
        policy.model.gradient_checkpointing_enable()
    out = policy.expand(ids, mask)
    loss = policy.token_logprobs(out.hidden_BTH, ids, where_BT=mask).sum()
    loss.backward()
    got = [parameter.grad.clone() for parameter in policy.projector.parameters()]
    policy.projector.zero_grad()
    policy.model.gradient_checkpointing_disable()
    plain = sum(plain_logprobs(plain_expand(policy, values)[0], values).sum() for values in rows)
    plain.backward()
    wanted = [parameter.grad for parameter in policy.projector.parameters()]
    assert abs((loss - plain).item()) < 1e-8
    assert max(relative(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-8
    assert min(b.abs().max().item() for b in wanted) > 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_base_gradients_of_replay_equal_the_plain_loop(policy, checkpointing):
    rows = random_rows(policy, SPANS, 24)
    ids, mask = padded(rows, "right")
    with torch.no_grad():
        latents = policy.expand(ids, mask).latents
    policy.model.zero_grad()
    if checkpointing:
        policy.model.gradient_checkpointing_enable()
    out = policy.replay(ids, mask, latents)
    policy.token_logprobs(out.hidden_BTH, ids, where_BT=mask).sum().backward()
    got = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    policy.model.gradient_checkpointing_disable()
    for values, fixed in zip(rows, latents, strict=True):
        plain_logprobs(plain_expand(policy, values, fixed)[0], values).sum().backward()
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            assert relative(got[name], parameter.grad) < 1e-8, name


def behind_prefixes(policy, rows):
    """Rows of three prompts, whose first 12, 0 and 8 tokens are run once; own tokens, prefix, whole rows."""
    rows = [rows[0], [*rows[0][:12], *rows[2][8:]], rows[1], [*rows[4][:8], *rows[3][8:]], rows[4]]
    prefix = SharedPrefix.of([tuple(row[:cut]) for row, cut in zip(rows, (12, 12, 0, 8, 8), strict=True)])
    return [row[cut:] for row, cut in zip(rows, prefix.lengths_B, strict=True)], prefix, rows


PREFIXED = [[(14, 1)], [], [(9, 5), (20, 1)], [(21, 4)], [(10, 2)]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_behind_a_shared_prefix_equal_the_plain_loop(policy, side):
    """Locks out rows that see another prompt, positions that start anew, and holes of shorter prompts that are seen."""
    own, prefix, rows = behind_prefixes(policy, random_rows(policy, PREFIXED, 24))
    ids, mask = padded(own, side)
    with torch.no_grad():
        expanded = policy.expand(ids, mask, prefix=prefix)
        replayed = policy.replay(ids, mask, expanded.latents, prefix=prefix)
        for row, values in enumerate(rows):
            logits, latents = plain_expand(policy, values)
            wanted = logits[prefix.lengths_B[row] :]
            assert torch.allclose(expanded.latents[row], latents, atol=1e-9, rtol=0)
            for out in (expanded, replayed):
                assert torch.allclose(out.logits_BTV[row][mask[row].bool()], wanted, atol=1e-9, rtol=0)
    assert len(prefix.ids) == 3 and sum(map(len, expanded.latents)) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_base_through_a_shared_prefix(policy, checkpointing):
    own, prefix, rows = behind_prefixes(policy, random_rows(policy, PREFIXED, 24))
    ids, mask = padded(own, "right")
    with torch.no_grad():
        latents = policy.expand(ids, mask, prefix=prefix).latents
    if checkpointing:
        policy.enable_checkpointing()
    policy.model.zero_grad()
    out = policy.replay(ids, mask, latents, prefix=prefix)
    policy.token_logprobs(out.hidden_BTH, ids, where_BT=mask).sum().backward()
    got = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    policy.model.gradient_checkpointing_disable()
    for values, fixed, before in zip(rows, latents, prefix.lengths_B, strict=True):
        plain_logprobs(plain_expand(policy, values, fixed)[0], values)[before + 1 :].sum().backward()
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            assert relative(got[name], parameter.grad) < 1e-8, name


def test_a_prefix_that_does_not_fit_its_rows_is_refused():
    policy = live_policy("llama")
    marker = policy.marker_ids(2)
    ids, mask = padded([[5, 6], [7, 8]], "right")
    with pytest.raises(ValueError, match=r"row 1: a marker ends at token .* of its prefix"):
        policy.expand(ids, mask, prefix=SharedPrefix.of([(5,), (*marker, 9)]))
    with pytest.raises(ValueError, match=r"for 1 rows, 2 given"):
        policy.expand(ids, mask, prefix=SharedPrefix.of([(5,)]))
    split = SharedPrefix.of([tuple(marker[:-1])])  # a marker that begins in the prefix is found all the same
    out = policy.expand(*padded([[marker[-1], 6]], "right"), prefix=split)
    assert [span.steps for span in out.spans[0]] == [2] and out.spans[0][0].position == 0


@pytest.mark.parametrize("shared", [False, True])
def test_checkpointing_runs_each_layer_twice_and_one_at_a_time(shared):
    """Locks out activations of all layers side by side in the backward pass: what checkpointing is there to avoid."""
    policy = live_policy("llama")
    policy.enable_checkpointing()
    calls = []
    for number, block in enumerate(policy.model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    own, prefix, rows = behind_prefixes(policy, random_rows(policy, PREFIXED, 24))
    ids, mask = padded(own if shared else rows, "right")
    out = policy.expand(ids, mask, prefix=prefix if shared else None)
    forwards, calls[:] = list(calls), []
    out.hidden_BTH.sum().backward()
    assert sorted(calls) == sorted(forwards)
    assert calls[:2] == [1, 0], "the last layer is run again, and done with, before the one below it"


def test_an_output_that_is_dropped_takes_its_keys_and_values_along():
    """Locks out a cycle from a checkpoint to what was computed in it, which Python cannot collect."""
    policy = live_policy("llama")
    policy.enable_checkpointing()
    ids, mask = padded(random_rows(policy, SPANS, 24), "right")
    policy.expand(ids, mask)
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is PieceLayer]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_stays_close_to_the_plain_loop(architecture):
    """The plain loop in float64: two loops in float32 each go astray, in directions of their own."""
    policy = live_policy(architecture, torch.float32)
    wide = copy.deepcopy(policy).double()
    wide.backbone = Backbone(wide.model)
    rows = random_rows(policy, SPANS, 24)
    ids, mask = padded(rows, "right")
    with torch.no_grad():
        expanded = policy.expand(ids, mask)
        replayed = policy.replay(ids, mask, expanded.latents)
        for row, values in enumerate(rows):
            truth, _ = plain_expand(wide, values)
            for out in (expanded, replayed):
                assert relative(out.logits_BTV[row, : len(values)].double(), truth) < 1e-4


@pytest.mark.parametrize("architecture", ["mistral", "qwen3"])
def test_sliding_windows_count_positions_not_cache_slots(architecture):
    """Rows of a batch leave holes in the cache; a window that counted slots would look too near."""
    overrides = {"sliding_window": 8}
    if architecture == "qwen3":
        overrides |= {"use_sliding_window": True, "max_window_layers": 1}
    policy = live_policy(architecture, **overrides)
    rows = random_rows(policy, SPANS, 24)
    ids, mask = padded(rows, "right")
    with torch.no_grad():
        out = policy.expand(ids, mask)
        for row, values in enumerate(rows):
            logits, _ = plain_expand(policy, values)
            assert torch.allclose(out.logits_BTV[row, : len(values)], logits, atol=1e-9, rtol=0)


def test_eager_attention_gives_the_same_numbers():
    policy = live_policy("llama")
    ids, mask = padded(random_rows(policy, SPANS, 24), "left")
    with torch.no_grad():
        sdpa = policy.expand(ids, mask).logits_BTV
        policy.model.set_attn_implementation("eager")
        eager = policy.expand(ids, mask).logits_BTV
    # transformers' eager attention takes its softmax in float32 whatever the model's dtype
    assert torch.allclose(sdpa[mask.bool()], eager[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["normalised", "residual"])
def test_projector_with_norms_keeps_the_scale_of_embeddings_and_is_its_formula(kind):
    policy = live_policy("llama", projector_kind=kind)
    x = hidden = torch.randn(5, policy.backbone.hidden_size, dtype=torch.float64)
    for block in policy.projector:
        y = block(x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
        x = x + y if kind == "residual" else y
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * policy.projector.gain
    assert torch.allclose(policy.projector(hidden), expected, atol=1e-12, rtol=0)
    ids, mask = padded(random_rows(policy, SPANS, 24), "right")
    with torch.no_grad():
        out = policy.expand(ids, mask)
    assert 0.5 < policy.scale_ratio(out.latents) < 2


def test_modes_zero_and_shuffled(policy):
    ids, mask = padded(random_rows(policy, SPANS, 24), "right")
    with torch.no_grad():
        real, zero, shuffled = (policy.expand(ids, mask, mode) for mode in ("real", "zero", "shuffled"))
        plain_text = policy.model(input_ids=ids[:1, : int(mask[0].sum())]).logits[0]
    assert all(len(latents) == 0 for latents in zero.latents)
    assert torch.allclose(zero.logits_BTV[0, : len(plain_text)], plain_text, atol=1e-9, rtol=0)
    assert [len(a) for a in shuffled.latents] == [len(a) for a in real.latents]
    assert not torch.allclose(shuffled.latents[0], real.latents[0])


def test_shuffled_needs_a_second_row(policy):
    ids, mask = padded(random_rows(policy, SPANS[:1], 24), "right")
    with pytest.raises(ValueError, match="at least 2 rows"):
        policy.expand(ids, mask, "shuffled")


def test_replay_takes_runs_that_a_limit_cut_and_refuses_any_other_number(policy):
    rows = random_rows(policy, [[(5, 3)], [(5, 2)]], 9)
    rows = [rows[0] + policy.marker_ids(4), rows[1]]
    ids, mask = padded(rows, "right")
    with torch.no_grad():
        latents = list(policy.expand(ids, mask).latents)
        whole = policy.replay(ids, mask, latents).logits_BTV
        cut = policy.replay(ids, mask, [latents[0][:4], latents[1]]).logits_BTV
    assert torch.allclose(whole[0, : len(rows[0]) - 1], cut[0, : len(rows[0]) - 1], atol=1e-9)
    with pytest.raises(ValueError, match="row 1: 1 latents given, its markers ask for 2"):
        policy.replay(ids, mask, [latents[0], latents[1][:1]])
    with pytest.raises(ValueError, match="row 0: 2 latents given"):
        policy.replay(ids, mask, [latents[0][:2], latents[1]])
    with pytest.raises(ValueError, match="row 1: 3 latents given"):
        policy.replay(ids, mask, [latents[0], torch.cat([latents[1], latents[1][:1]])])


def test_empty_rows_and_too_many_positions_are_refused(policy):
    with pytest.raises(ValueError, match="row 1 has no tokens"):
        policy.expand(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"600 positions.*the model has 512"):
        policy.expand(torch.full((1, 600), 70), torch.ones(1, 600))


def test_chunked_head_bounds_logits_and_changes_nothing(policy, monkeypatch):
    """Logits of a 150k vocabulary are what runs out of memory first: no chunk may pass the limit."""
    ids, mask = padded(random_rows(policy, SPANS, 24), "right")
    policy.model.requires_grad_(False)
    sizes = []
    head = policy.backbone.head

    def measured(hidden):
        logits = head(hidden)
        sizes.append(logits.numel() * logits.element_size())
        return logits

    out = policy.expand(ids, mask)
    whole = policy.token_logprobs(out.hidden_BTH, ids, where_BT=mask)
    monkeypatch.setattr(policy.backbone, "head", measured)
    policy.logits_mib = 1
    rows = out.hidden_BTH.repeat(1, 20, 1), ids.repeat(1, 20)
    policy.token_logprobs(*rows).sum().backward()
    assert len(sizes) > 4 and max(sizes) <= 2**20
    assert torch.allclose(policy.token_logprobs(out.hidden_BTH, ids, where_BT=mask), whole, atol=1e-12)
    assert whole[1, 1].item() == pytest.approx(out.logits_BTV[1, 0].log_softmax(-1)[ids[1, 1]].item(), abs=1e-12)
