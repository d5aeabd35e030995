"""The real policy under the engine: RL update, projector update, resume to the last bit."""

import pytest
import torch

from lrscale.config.optimisation import OptimisationConfig
from lrscale.objective import PolicyObjective, after_first_marker_mask, policy_loss, projector_loss
from lrscale.parallel.checkpoint import CheckpointStore
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.single import SingleEngine
from lrscale.records import TrainBatch
from tests.unit.latent.tiny_models import live_policy, padded, random_rows
from tests.unit.parallel.stand_in import same, weights


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def engine_for(dtype):
    return SingleEngine(live_policy(dtype=dtype), OptimisationConfig(), ranks=Ranks())


def rows(policy):
    return padded(random_rows(policy, [[(4, 2)], [(3, 1), (8, 3)], []], 16), "right")


def refresh(engine, learning_rate=1e-3):
    ids_BT, mask_BT = rows(engine.policy)
    with engine.training("projector"):
        out = engine.policy.expand(ids_BT, mask_BT)
        logprobs_BT = engine.policy.token_logprobs(out.hidden_BTH, ids_BT)
        after_BT = after_first_marker_mask(out.spans, mask_BT)
        loss = projector_loss(logprobs_BT, after_BT, int(after_BT.sum()))
        engine.backward(loss)
        engine.step("projector", learning_rate=learning_rate, max_grad_norm=1.0)
    return float(loss.detach())


def rl_update(engine, learning_rate=1e-3):
    policy = engine.policy
    ids_BT, mask_BT = rows(policy)
    with torch.no_grad():
        out = policy.expand(ids_BT, mask_BT)
        old_BT = policy.token_logprobs(out.hidden_BTH, ids_BT)
    actions_BT = mask_BT.float()
    actions_BT[:, 0] = 0
    batch = TrainBatch(ids_BT, mask_BT, actions_BT, old_BT, torch.tensor([1.0, -1.0, 0.5]), tuple(out.latents))
    with engine.training("base"):
        hidden_BTH = policy.replay(ids_BT, mask_BT, batch.latents).hidden_BTH
        logprobs_BT = policy.token_logprobs(hidden_BTH, ids_BT)
        result = policy_loss(logprobs_BT, batch, PolicyObjective(), normaliser=float(actions_BT.sum()))
        engine.backward(result.loss)
        engine.step("base", learning_rate=learning_rate, max_grad_norm=1.0)
    return result


def test_projector_learns_and_base_stays():
    """Locks out a loss that does not reach the projector through the latent chain."""
    engine = engine_for(torch.float32)
    base = {name: p.clone() for name, p in engine.full_parameters() if not name.startswith("reasoning_projector.")}
    losses = [refresh(engine) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, base[name]) for name, p in engine.full_parameters() if name in base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(dtype, tmp_path):
    """Locks out a resumed run whose next RL update or refresh differs in the last bit."""
    straight = engine_for(dtype)
    refresh(straight)
    first = rl_update(straight)
    if dtype == torch.float32:  # replay of what expand has just produced
        assert first.stats.logprob_gap_max < 1e-4
    assert first.stats.clip_share == 0
    store = CheckpointStore(tmp_path)
    store.save("step-1", straight, {"step": 1})
    rl_update(straight)
    refresh(straight)
    resumed = engine_for(dtype)
    store.load(store.latest(), resumed)
    rl_update(resumed)
    refresh(resumed)
    assert same(weights(resumed), weights(straight))


def test_names_are_those_of_the_hugging_face_layout(tmp_path):
    """Locks out weights published under names that an inference engine does not know."""
    from safetensors import safe_open

    engine = engine_for(torch.float32)
    engine.policy.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {name for name, _ in engine.full_parameters()} == set(file.keys())
