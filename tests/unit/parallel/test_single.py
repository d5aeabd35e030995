"""SingleEngine: groups apart, gradients that add up, narrow weights that move, exact save and load."""

import math

import pytest
import torch

from lrscale.config.optimisation import OptimisationConfig
from lrscale.parallel.engine import NonFiniteError
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.single import SingleEngine
from tests.unit.parallel.stand_in import SmallPolicy, same, small_engine, update, weights


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_equals_torch_adamw():
    """Locks out a schedule, clip or decay that differs from plain AdamW with clip_grad_norm_."""
    engine = small_engine(weight_decay=0.1)
    twin = SmallPolicy()
    adamw = torch.optim.AdamW(twin.model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        norm = update(engine, "base", step, learning_rate=0.01 * (step + 1))
        for settings in adamw.param_groups:
            settings["lr"] = 0.01 * (step + 1)
        adamw.zero_grad()
        twin.loss(step).backward()
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)), rel=1e-6)
        adamw.step()
    expected = dict(twin.model.named_parameters())
    for name, value in weights(engine).items():
        if name in expected:
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("group", ["base", "projector"])
def test_other_group_is_frozen_and_flags_come_back(group):
    """Locks out an RL step that moves the projector, or a refresh that moves the policy."""
    engine = small_engine()
    before = weights(engine)
    engine.policy.model.mlp.bias.requires_grad_(requires_grad=False)
    with engine.training(group):
        trained, frozen = engine.policy.model, engine.policy.projector
        if group == "projector":
            trained, frozen = frozen, trained
        assert trained.training and not frozen.training
        assert all(p.requires_grad for p in trained.parameters())
        assert not any(p.requires_grad for p in frozen.parameters())
    assert engine.policy.training and not engine.policy.model.mlp.bias.requires_grad
    update(engine, group, 0)
    moved = {name for name, value in weights(engine).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("reasoning_projector.") == (group == "projector")}
    assert all(p.grad is None for p in engine.policy.parameters())


def test_micro_batches_add_up():
    """Locks out gradients cleared between micro-batches."""
    whole, split = small_engine(dtype=torch.float64), small_engine(dtype=torch.float64)
    with whole.training("base"):
        whole.backward((whole.policy.loss(1) + whole.policy.loss(2)) / 2)
        norm = whole.step("base", learning_rate=0.1, max_grad_norm=0.05)
    with split.training("base"):
        split.backward(split.policy.loss(1) / 2)
        split.backward(split.policy.loss(2) / 2)
        assert split.step("base", learning_rate=0.1, max_grad_norm=0.05) == pytest.approx(norm, rel=1e-12)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(split)[name], rtol=1e-10, atol=1e-12)


def test_bfloat16_moves_at_a_tiny_learning_rate():
    """Locks out AdamW on bf16 weights: at 5e-7 every step rounds away. Plain AdamW is the control that must fail."""
    engine, plain = small_engine(dtype=torch.bfloat16), SmallPolicy(dtype=torch.bfloat16)
    for policy in (engine.policy, plain):
        torch.nn.init.constant_(policy.model.mlp.weight, 0.25)  # half an ulp of bf16 is 4.9e-4 below it
    adamw = torch.optim.AdamW(plain.parameters(), lr=5e-6, weight_decay=0.0)
    before = engine.policy.model.mlp.weight.detach().clone()
    for _ in range(150):
        update(engine, "base", 0, learning_rate=5e-6)
        adamw.zero_grad()
        plain.loss(0).backward()
        adamw.step()
    assert engine.policy.model.mlp.weight.dtype == torch.bfloat16
    assert not torch.equal(engine.policy.model.mlp.weight, before)
    assert torch.equal(plain.model.mlp.weight, before)


def test_bfloat16_gradients_are_summed_in_float32():
    """Locks out small micro-batches lost in the bf16 sum behind a large one."""
    engine = small_engine(dtype=torch.bfloat16)
    weight = engine.policy.model.mlp.weight
    with engine.training("base"):
        engine.backward(weight.sum() * 256.0)
        for _ in range(64):
            engine.backward(weight.sum() * 0.5)  # 256 + 0.5 is 256 in bf16
        assert engine.step("base", learning_rate=1e-3, max_grad_norm=1e9) == pytest.approx(288.0 * 5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_survive_switches_and_save_load(dtype, tmp_path):
    """Locks out a fresh AdamW at each refresh, and a resume that differs in the last bit."""
    turns = [("base", 1), ("projector", 2), ("base", 3), ("projector", 4), ("base", 5)]
    straight, resumed = small_engine(dtype=dtype), small_engine(dtype=dtype)
    for group, seed in turns:
        update(straight, group, seed)
    for group, seed in turns[:3]:
        update(resumed, group, seed)
    resumed.save(tmp_path)
    fresh = small_engine(dtype=dtype)
    for parameter in fresh.policy.parameters():
        torch.nn.init.constant_(parameter, 9.0)
    update(fresh, "projector", 77)  # moments that the load has to replace
    fresh.load(tmp_path)
    assert fresh.policy.model.head.weight is fresh.policy.model.embed.weight
    for group, seed in turns[3:]:
        update(fresh, group, seed)
    assert same(weights(fresh), weights(straight))
    forgetful = small_engine(dtype=dtype)
    forgetful.load(tmp_path)
    forgetful.reset_optimizer("base")
    forgetful.reset_optimizer("projector")
    for group, seed in turns[3:]:
        update(forgetful, group, seed)
    assert not same(weights(forgetful), weights(straight))


def test_load_starts_untrained_groups_afresh(tmp_path):
    """Locks out RL moments of one arm that leak into the next one, which starts from the SFT checkpoint."""
    engine = small_engine()
    update(engine, "projector", 1)
    engine.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.json", "rank-00000.safetensors"]
    update(engine, "base", 2)
    first = weights(engine)
    update(engine, "base", 3)
    engine.load(tmp_path)
    update(engine, "base", 2)
    assert same(weights(engine), first)


def test_tied_weights_are_saved_once(tmp_path):
    """Locks out safetensors' refusal of shared tensors, and a tied weight counted twice in the norm."""
    engine = small_engine()
    names = [name for name, _ in engine.full_parameters()]
    assert "embed.weight" in names and "head.weight" not in names
    assert {piece.name for piece in engine.local_state()} == {f"weights/{name}" for name in (*names, "scale")}
    engine.save(tmp_path)


def test_load_names_what_does_not_fit(tmp_path):
    small_engine().save(tmp_path)
    other = small_engine(width=6)
    before = weights(other)
    with pytest.raises(ValueError, match=r"embed.weight: \[7, 5\].*\[7, 6\]"):
        other.load(tmp_path)
    assert same(weights(other), before)
    with pytest.raises(ValueError, match="bfloat16"):
        small_engine(dtype=torch.bfloat16).load(tmp_path)


def test_non_finite_stops_before_anything_moves():
    """Locks out a NaN that reaches weights or moments."""
    engine = small_engine()
    update(engine, "base", 0)
    before = weights(engine)
    moments = {piece.name: piece.values.clone() for piece in engine.local_state()}
    with engine.training("base"), pytest.raises(NonFiniteError, match="loss is nan"):
        engine.backward(engine.policy.loss(1) * math.nan)
    with engine.training("base"), pytest.raises(NonFiniteError, match=r"base.*mlp.weight.*no weight"):
        engine.backward(engine.policy.loss(1))
        engine.policy.model.mlp.weight.grad[0, 0] = math.inf
        engine.step("base", learning_rate=1.0, max_grad_norm=1.0)
    assert same(weights(engine), before)
    assert same({piece.name: piece.values for piece in engine.local_state()}, moments)


def test_interrupted_update_leaves_no_gradients():
    """Locks out half an update's gradients that reach the next one after an exception."""
    engine, twin = small_engine(), small_engine()
    with pytest.raises(KeyError), engine.training("base"):
        engine.backward(engine.policy.loss(1))
        raise KeyError
    update(engine, "base", 2)
    update(twin, "base", 2)
    assert same(weights(engine), weights(twin))


def test_step_without_gradients_moves_nothing():
    """Locks out weight decay and momentum at a step whose groups all lacked signal."""
    engine = small_engine(weight_decay=0.5)
    update(engine, "base", 0)
    before = weights(engine)
    assert engine.step("base", learning_rate=1.0, max_grad_norm=1.0) == 0.0
    assert same(weights(engine), before)


def test_one_of_several_processes_is_refused():
    """Locks out k processes that each train their own copy and overwrite each other's checkpoints."""
    with pytest.raises(ValueError, match="WORLD_SIZE is 2"):
        SingleEngine(SmallPolicy(), OptimisationConfig(), ranks=Ranks(0, 2, 0))
