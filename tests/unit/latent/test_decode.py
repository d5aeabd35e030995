"""generate against the plainest loop: tokens, log-probs, latents, limits, and rows that do not feel each other."""

from __future__ import annotations

import pytest
import torch

from lrscale.latent.sampling import SamplingOptions, draw, row_streams, uniforms
from tests.unit.latent.plain_loop import plain_expand, plain_logprobs
from tests.unit.latent.tiny_models import ARCHITECTURES, live_policy, padded

PROMPTS = [
    "a short one",
    "a prompt <implicit_thought>2</implicit_thought> with latents inside, rather longer than the others",
    "ends in a marker <implicit_thought>3</implicit_thought>",
    "ends inside a marker <implicit_thought>",
    "a short one",
    "<implicit_thought>1</implicit_thought>",
]


def writes_markers(policy, monkeypatch):
    """Bias the head so that random text is full of markers, stops and a few letters.

    The projector is the normalised one: chains of 40 latents through the other amplify rounding past 1e-9.
    """
    head = policy.backbone.head
    bias = torch.full((len(policy.tokenizer),), -30.0, dtype=policy.backbone.dtype)
    vocabulary = policy.tokenizer.get_vocab()
    for token, weight in (
        ("<implicit_thought>", 2.0),
        ("</implicit_thought>", 2.0),
        ("2", 1.5),
        ("4", 1.0),
        ("x", 0.5),
    ):
        bias[vocabulary[token]] = weight
    bias[policy.tokenizer.eos_token_id] = -0.3
    monkeypatch.setattr(policy.backbone, "head", lambda hidden: head(hidden) * 0.3 + bias)
    return policy


@pytest.fixture(params=ARCHITECTURES)
def policy(request, monkeypatch):
    return writes_markers(live_policy(request.param, projector_kind="normalised"), monkeypatch)


@pytest.fixture
def llama(monkeypatch):
    return writes_markers(live_policy("llama", projector_kind="normalised"), monkeypatch)


def same(a, b):
    assert a.completion_ids == b.completion_ids
    assert a.latent_spans == b.latent_spans
    assert torch.allclose(a.logprobs_T, b.logprobs_T, atol=1e-9)
    assert torch.allclose(a.latents_LH, b.latents_LH, atol=1e-9)


@torch.no_grad()
def test_every_draw_log_prob_and_latent_equals_the_plain_loop(policy):
    rollouts = policy.generate(PROMPTS, max_new_tokens=60, seed=3)
    written = 0
    for key, rollout in enumerate(rollouts):
        ids = [*rollout.prompt_ids, *rollout.completion_ids]
        logits, latents = plain_expand(policy, ids, rollout.latents_LH)
        head_bias = policy.backbone.head(torch.zeros(1, policy.backbone.hidden_size, dtype=torch.float64))
        logits = logits * 0.3 + head_bias
        assert torch.allclose(rollout.latents_LH, latents, atol=1e-9)
        logprobs = plain_logprobs(logits, ids)[len(rollout.prompt_ids) :]
        assert torch.allclose(rollout.logprobs_T, logprobs, atol=1e-9)
        stream = row_streams(3, [key], torch.device("cpu"))
        steps_at = {span.position: span.steps for span in rollout.latent_spans}
        position = steps_at.get(len(rollout.prompt_ids) - 1, 0)
        for index, token in enumerate(rollout.completion_ids, start=len(rollout.prompt_ids)):
            drawn, _ = draw(logits[index - 1][None], uniforms(stream, position), SamplingOptions())
            assert int(drawn) == token
            position += 1 + steps_at.get(index, 0)
        assert position == rollout.length <= 60
        assert rollout.stop_reason == ("stop" if ids[-1] == policy.tokenizer.eos_token_id else "length")
        written += len(rollout.latent_spans)
    assert written > 4 and {rollout.stop_reason for rollout in rollouts} == {"stop", "length"}


@torch.no_grad()
def test_rollout_log_probs_equal_those_of_one_replay(policy):
    rollouts = policy.generate(PROMPTS * 3, max_new_tokens=50, seed=5, temperature=0.8)
    ids, mask = padded([[*r.prompt_ids, *r.completion_ids] for r in rollouts], "right")
    out = policy.replay(ids, mask, [r.latents_LH for r in rollouts])
    logprobs = policy.token_logprobs(out.hidden_BTH, ids, temperature=0.8)
    zeroed = policy.replay(ids, mask, [r.latents_LH * 0 for r in rollouts])
    control = policy.token_logprobs(zeroed.hidden_BTH, ids, temperature=0.8)
    gaps = []
    for row, r in enumerate(rollouts):
        tokens = slice(len(r.prompt_ids), len(r.prompt_ids) + len(r.completion_ids))
        assert torch.allclose(logprobs[row, tokens], r.logprobs_T, atol=1e-9)
        gaps.append((control[row, tokens] - r.logprobs_T).abs().max())
    assert max(gaps) > 1e-3, "zeroed latents must not pass"


def test_a_row_does_not_depend_on_its_batch(llama):
    """Locks out shared random state, wrong compaction, and prompts prefilled together by mistake."""
    together = llama.generate(PROMPTS, max_new_tokens=60, seed=7)
    order = [4, 2, 0, 5, 3, 1]
    shuffled = llama.generate([PROMPTS[i] for i in order], max_new_tokens=60, seed=7, row_keys=order)
    small = llama.generate(PROMPTS, max_new_tokens=60, seed=7, batch_rows=2)
    for position, index in enumerate(order):
        same(shuffled[position], together[index])
    for index, prompt in enumerate(PROMPTS):
        same(small[index], together[index])
        same(llama.generate([prompt], max_new_tokens=60, seed=7, row_keys=[index])[0], together[index])
    assert together[0].completion_ids != together[4].completion_ids, "same prompt, another stream"


def test_rollouts_are_yielded_as_they_finish(llama):
    finished = list(llama.iter_generate(PROMPTS * 4, max_new_tokens=60, seed=1))
    lengths = [rollout.length for _, rollout in finished]
    assert lengths == sorted(lengths) and sorted(i for i, _ in finished) == list(range(24))
    assert len(set(lengths)) > 3


def test_limits_count_latents_and_cut_runs(llama):
    """max_new_tokens bounds tokens plus latents; a run cut in the middle says how far it came."""
    prompt = PROMPTS[2]
    one = llama.generate([prompt], max_new_tokens=2)[0]
    assert one.completion_ids == () and one.latent_spans[-1].steps == 2 and one.length == 2
    assert one.latents_LH.shape[0] == 2 and one.stop_reason == "length" and one.logprobs_T.shape == (0,)
    for limit in range(1, 40):
        rollout = llama.generate([PROMPTS[3]], max_new_tokens=limit, seed=2)[0]
        ids = [*rollout.prompt_ids, *rollout.completion_ids]
        wanted = sum(span.steps for span in llama.detector.find(ids))
        assert rollout.length <= limit and rollout.latents_LH.shape[0] <= wanted
        llama.replay(torch.tensor([ids]), torch.ones(1, len(ids)), [rollout.latents_LH])


def test_minimum_length_and_stop_ids(llama):
    for rollout in llama.generate(PROMPTS, max_new_tokens=40, min_new_tokens=20, seed=4):
        assert rollout.length >= 20
    letter = llama.tokenizer.convert_tokens_to_ids("x")
    stopped = llama.generate(PROMPTS, max_new_tokens=80, stop_ids=[letter], seed=4)
    assert all(r.completion_ids[-1] == letter for r in stopped if r.stop_reason == "stop")
    assert any(r.stop_reason == "stop" for r in stopped)


def test_zero_mode_takes_no_latent_steps(llama):
    rollouts = llama.generate(PROMPTS, max_new_tokens=60, seed=3, mode="zero")
    assert all(r.latent_spans == () and r.latents_LH.shape[0] == 0 for r in rollouts)
    assert any(llama.detector.find(r.completion_ids) for r in rollouts)
    greedy = llama.generate(PROMPTS[:1], max_new_tokens=8, temperature=0, mode="zero")[0]
    ids = list(greedy.prompt_ids)
    for token in greedy.completion_ids:
        hidden = llama.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        assert int(llama.backbone.head(hidden[0, -1]).argmax()) == token
        ids.append(token)


@torch.no_grad()
def test_shuffled_latents_come_from_other_rows_and_replay_exactly(llama):
    rollouts = llama.generate(PROMPTS * 3, max_new_tokens=50, seed=3, mode="shuffled")
    ids, mask = padded([[*r.prompt_ids, *r.completion_ids] for r in rollouts], "right")
    out = llama.replay(ids, mask, [r.latents_LH for r in rollouts])
    logprobs = llama.token_logprobs(out.hidden_BTH, ids)
    expanded = llama.expand(ids, mask)
    for row, r in enumerate(rollouts):
        tokens = slice(len(r.prompt_ids), len(r.prompt_ids) + len(r.completion_ids))
        assert torch.allclose(logprobs[row, tokens], r.logprobs_T, atol=1e-9)
    own = expanded.latents[1][:1]
    assert not torch.allclose(rollouts[1].latents_LH[:1], own, atol=1e-6)


def test_numbers_that_are_not_finite_come_back_to_the_caller(llama):
    """A NaN latent must end as a named error of the run, not as an index error inside the sampler."""
    with torch.no_grad():
        llama.projector.gain.fill_(float("nan"))
    rollout = llama.generate([PROMPTS[2]], max_new_tokens=12)[0]
    assert not torch.isfinite(rollout.latents_LH).any() and not torch.isfinite(rollout.logprobs_T).any()


def test_latents_inside_a_prompt_count_as_positions(llama):
    """Learned positions end in an index error, on a GPU in an assert that kills the context."""
    prompt = "<implicit_thought>32</implicit_thought>" * 15 + "x"
    with pytest.raises(ValueError, match="the model has 512"):
        llama.generate([prompt], max_new_tokens=8)


@pytest.mark.parametrize("rows", [2, 3, 5, 7])
def test_no_shuffled_row_is_left_alone_in_a_batch(llama, rows):
    """A last batch of one row has nobody to swap latents with: the run used to end in the middle."""
    rollouts = llama.generate(PROMPTS[2:3] * rows, max_new_tokens=6, mode="shuffled", batch_rows=2)
    assert len(rollouts) == rows


def test_top_k_top_p_and_forbidden_ids_against_plain_loops():
    torch.manual_seed(0)
    logits = torch.randn(500, 12, dtype=torch.float64) * 2
    uniform = torch.rand(500, dtype=torch.float64)
    forbidden = torch.tensor([3, 7])
    options = SamplingOptions(temperature=0.7, top_p=0.8, top_k=6)
    tokens, logprobs = draw(logits, uniform, options, forbidden)
    for row in range(500):
        full = torch.softmax(logits[row] / 0.7, -1)
        allowed = sorted((i for i in range(12) if i not in (3, 7)), key=lambda i: -full[i])[:6]
        total, kept, mass = sum(full[i] for i in allowed), [], 0.0
        for i in allowed:
            if mass < 0.8 * total:
                kept.append(i)
                mass += full[i]
        target, cumulative = uniform[row] * sum(full[i] for i in kept), 0.0
        for i in sorted(kept):
            cumulative += full[i]
            if target < cumulative:
                break
        assert int(tokens[row]) == i
        assert logprobs[row].item() == pytest.approx(full[i].log().item(), abs=1e-12)


def test_uniforms_are_even_and_streams_unrelated():
    """A weak mixer would make neighbouring rows or positions sample alike."""
    streams = row_streams(0, range(2000), torch.device("cpu"))
    draws = torch.stack([uniforms(streams, position) for position in range(50)])
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5e-3 and abs(draws.var() - 1 / 12) < 2e-3
    correlation = torch.corrcoef(draws).fill_diagonal_(0).abs().max()
    assert correlation < 0.12
    assert not torch.equal(uniforms(row_streams(1, range(2000), torch.device("cpu")), 0), draws[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: given 0"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens: given 5"),
        ({"max_new_tokens": 4, "temperature": -1}, "temperature: given -1"),
        ({"max_new_tokens": 4, "top_p": 0}, "top_p: given 0"),
        ({"max_new_tokens": 4, "mode": "dead"}, "mode: given 'dead'"),
        ({"max_new_tokens": 4, "row_keys": [1, 2]}, "row_keys: 2 given for 1 prompts"),
        ({"max_new_tokens": 600}, "the model has 512"),
    ],
)
def test_bad_options_are_answered(llama, options, message):
    with pytest.raises(ValueError, match=message):
        llama.generate(["x"], **options)
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        llama.generate([[]], max_new_tokens=3)
