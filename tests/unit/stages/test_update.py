"""The policy update against the plainest loop: one row at a time, float64, no masks, no padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lrscale.config.optimisation import OptimisationConfig
from lrscale.config.stages import ImportanceConfig, KlConfig, RlConfig
from lrscale.latent import LatentPolicy
from lrscale.parallel.engine import NonFiniteError
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.single import SingleEngine
from lrscale.records import Prompt, Rollout, RolloutGroup, Score, ScoreFailed
from lrscale.stages.rl import rewards
from lrscale.stages.update import Row, UpdateSettings, minibatches, scored_rows, update_policy
from tests.unit.latent.tiny_models import live_policy

RATE = 1e-3


def _settings(**rl: object) -> UpdateSettings:
    return UpdateSettings(
        rl=RlConfig(max_grad_norm=1e9, **rl),
        mode="real",
        temperature=0.7,
        max_new_tokens=12,
        micro_batch_tokens=10_000,
        seed=0,
    )


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    policy = live_policy()
    markers = [policy.marker_ids(1 + i) for i in range(3)]
    texts = [policy.encode("ab" * (1 + i)) for i in range(3)]
    # Two samples each of a prompt that a marker ends, a longer one, and one with a marker inside, which cannot be shared.
    prompts = [[*texts[0], *markers[0]], [*texts[2], *markers[1]], [*texts[1], *markers[2], *texts[0]]]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    return policy.generate(prompts, max_new_tokens=12, temperature=0.7, seed=5)


def _rows(rollouts: list[Rollout]) -> list[Row]:
    advantages = [1.5, -1.0, 0.0, 0.5, -2.0, 0.0]
    return [Row(f"p{i}/0", rollout, a) for i, (rollout, a) in enumerate(zip(rollouts, advantages, strict=True))]


def _engine(policy: LatentPolicy | None = None) -> SingleEngine:
    return SingleEngine(policy or live_policy(), OptimisationConfig(), ranks=Ranks())


def _weights(engine: SingleEngine) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in engine.policy.model.parameters()])


def _updated(rows: list[Row], settings: UpdateSettings, **options: object) -> tuple[Tensor, float, float]:
    engine = _engine()
    result = update_policy(engine, rows, settings, step=1, learning_rate=RATE, **options)
    return _weights(engine), result.loss, result.grad_norm


def _plain_loss(policy: LatentPolicy, rows: list[Row], settings: UpdateSettings) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        prompt, completion = row.rollout.prompt_ids, row.rollout.completion_ids
        ids_1T = torch.tensor([[*prompt, *completion]])
        logits = policy.replay(ids_1T, torch.ones_like(ids_1T), [row.rollout.latents_LH]).logits_BTV[0]
        logprobs = torch.log_softmax(logits / settings.temperature, dim=-1)
        for t, token in enumerate(completion):
            ratio = torch.exp(logprobs[len(prompt) + t - 1, token] - row.rollout.logprobs_T[t])
            clipped = ratio.clamp(1 - settings.rl.clip_low, 1 + settings.rl.clip_high)
            total = total - torch.minimum(ratio * row.advantage, clipped * row.advantage)
    return total / sum(len(row.rollout.completion_ids) for row in rows)


def test_loss_gradient_and_step_are_those_of_the_plainest_loop(rollouts: list[Rollout]):
    """Latents replayed, temperature of the rollout, tokens of the whole update as the normaliser."""
    settings = _settings()
    weights, loss, norm = _updated(_rows(rollouts), settings)
    plain = _engine()
    expected = _plain_loss(plain.policy, _rows(rollouts), settings)
    expected.backward()
    parameters = [parameter for parameter in plain.policy.model.parameters() if parameter.grad is not None]
    expected_norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-9)
    assert norm == pytest.approx(float(expected_norm), rel=1e-8)
    config = OptimisationConfig()
    torch.optim.AdamW(parameters, lr=RATE, betas=config.betas, eps=config.eps, weight_decay=0.0).step()
    assert torch.allclose(weights, _weights(plain), atol=1e-9)


def test_zeroed_latents_give_another_loss(rollouts: list[Rollout]):
    """The control: with dead latents the test above would pass whatever replay did with them."""
    rows = _rows(rollouts)
    dead = [replace(row, rollout=replace(row.rollout, latents_LH=0 * row.rollout.latents_LH)) for row in rows]
    assert abs(_updated(rows, _settings())[1] - _updated(dead, _settings())[1]) > 1e-4


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("budget", [1, 40, 80, 10_000])
def test_micro_batches_change_nothing(
    rollouts: list[Rollout], budget: int, *, share_prompts: bool, monkeypatch: pytest.MonkeyPatch
):
    """Normalising by micro-batch instead of by update is the classic bug here."""
    monkeypatch.setattr("lrscale.stages.update.SHARING_GAIN", 9.0)  # however short the prompts
    whole = _updated(_rows(rollouts), replace(_settings(), share_prompts=False))
    cut = _updated(_rows(rollouts), replace(_settings(), micro_batch_tokens=budget, share_prompts=share_prompts))
    assert torch.allclose(whole[0], cut[0], atol=1e-9)
    assert whole[1] == pytest.approx(cut[1], abs=1e-9)


def test_samples_of_a_prompt_run_it_once():
    """Locks out sharing that is switched on and does nothing; log-probs that stay fixed go the same way."""
    policy = live_policy()
    sampled = policy.generate([policy.encode("ab" * 20)] * 4, max_new_tokens=12, temperature=0.7, seed=5)
    rows = [Row(f"p/{i}", rollout, i - 1.5) for i, rollout in enumerate(sampled)]
    settings = _settings(kl=KlConfig(coefficient=0.1), importance=ImportanceConfig(old_logprobs="recomputed"))
    fed = dict.fromkeys((False, True), 0)
    outcomes = []
    for share in fed:
        engine = _engine()

        def count(_: object, arguments: tuple[Tensor], *, share: bool = share) -> None:
            fed[share] += arguments[0].numel()

        engine.policy.model.get_input_embeddings().register_forward_pre_hook(count)
        shared = replace(settings, share_prompts=share)
        result = update_policy(engine, rows, shared, step=1, learning_rate=RATE, reference=live_policy())
        outcomes.append((_weights(engine), result.kl))
    assert torch.allclose(outcomes[0][0], outcomes[1][0], atol=1e-9)
    assert outcomes[0][1] == pytest.approx(outcomes[1][1], abs=1e-9)
    assert fed[True] < fed[False] / 2


def test_rows_without_a_gradient_change_nothing_but_count_in_the_normaliser(rollouts: list[Rollout]):
    """Skipping them must not make the others' gradients larger."""
    rows = _rows(rollouts)
    tiny = [replace(row, advantage=row.advantage or 1e-300) for row in rows]  # run through the model after all
    skipped, run = _updated(rows, _settings()), _updated(tiny, _settings())
    assert skipped[1] == pytest.approx(run[1], abs=1e-12)
    assert torch.allclose(skipped[0], run[0], atol=1e-9)


def test_an_update_without_signal_moves_no_weight(rollouts: list[Rollout]):
    """Adam's momentum alone would go on moving them."""
    engine = _engine()
    update_policy(engine, _rows(rollouts), _settings(), step=1, learning_rate=RATE)
    before = _weights(engine).clone()
    silent = [replace(row, advantage=0.0) for row in _rows(rollouts)]
    result = update_policy(engine, silent, _settings(), step=2, learning_rate=RATE)
    assert torch.equal(_weights(engine), before)
    assert (result.loss, result.grad_norm) == (0.0, 0.0)


def test_failed_scores_are_left_out(rollouts: list[Rollout]):
    """A failed score is no 0: neither its tokens nor its row count."""
    scores = (Score(1.0), ScoreFailed("error", "x"), Score(0.0))
    group = RolloutGroup(Prompt("p", "t"), tuple(rollouts[:3]), scores)
    rows = scored_rows([group], torch.tensor([[1.0, 9.0, -1.0]]))
    assert [(row.name, row.advantage) for row in rows] == [("p/0", 1.0), ("p/2", -1.0)]


def test_recomputed_logprobs_and_the_reference_are_those_of_the_unmoved_policy(rollouts: list[Rollout]):
    """With the weights that sampled, recomputing gives the rollout's own log-probs and a KL of 0."""
    settings = _settings(kl=KlConfig(coefficient=0.1), importance=ImportanceConfig(old_logprobs="recomputed"))
    engine = _engine()
    result = update_policy(engine, _rows(rollouts), settings, step=1, learning_rate=RATE, reference=live_policy())
    assert result.logprob_gap_max < 1e-9 and abs(result.kl) < 1e-9
    moved = update_policy(engine, _rows(rollouts), settings, step=2, learning_rate=RATE, reference=live_policy())
    assert moved.logprob_gap_max > 1e-4 and moved.kl > 1e-6


def test_minibatches_cover_the_rows_and_differ_by_pass(rollouts: list[Rollout]):
    rows = _rows(rollouts)
    first, second = minibatches(rows, 4, 0, 1, 0), minibatches(rows, 4, 0, 1, 1)
    assert sorted(row.name for part in first for row in part) == sorted(row.name for row in rows)
    assert [[row.name for row in part] for part in first] != [[row.name for row in part] for part in second]
    assert minibatches(rows[:2], 4, 0, 1, 0) and all(minibatches(rows[:2], 4, 0, 1, 0))


def test_several_updates_a_rollout_clip_and_move_further(rollouts: list[Rollout]):
    engine = _engine()
    result = update_policy(engine, _rows(rollouts), _settings(minibatches=2, passes=4), step=1, learning_rate=0.01)
    assert result.clip_share > 0.0
    assert result.logprob_gap_max < 1e-6, "the gap is that of the first update, before any weight had moved"


def test_a_loss_that_is_not_finite_names_step_and_sample_and_moves_nothing(rollouts: list[Rollout]):
    engine = _engine()
    before = _weights(engine).clone()
    rows = _rows(rollouts)
    broken = replace(rows[1].rollout, latents_LH=rows[1].rollout.latents_LH * float("nan"))
    rows[1] = replace(rows[1], rollout=broken)
    with pytest.raises(NonFiniteError, match=r"RL step 12.*p1/0"):
        update_policy(engine, rows, _settings(), step=12, learning_rate=RATE)
    assert torch.equal(_weights(engine), before)


def test_arms_without_the_price_of_length_get_it_back(rollouts: list[Rollout]) -> None:
    """Locks out an arm that is called free and pays, and a failed score that is given something."""
    scores = (
        Score(0.9, {"task": 1.0, "length": -0.1}),
        Score(0.0, {"task": 0.0, "length": 0.0}),
        ScoreFailed("timeout", "60 s"),
    )
    group = RolloutGroup(Prompt("p", "?", {}), tuple(rollouts[:3]), scores)
    priced_PG, valid_PG = rewards([group])
    free_PG, _ = rewards([group], priced=False)
    assert priced_PG.tolist() == [[0.9, 0.0, 0.0]]
    assert free_PG.tolist() == [[1.0, 0.0, 0.0]]
    assert valid_PG.tolist() == [[True, True, False]]
