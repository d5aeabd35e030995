"""The memory that models take, against figures that were worked out by hand or published."""

from __future__ import annotations

import pytest

from lrscale.config.hardware import load_machine
from lrscale.config.load import load_recipe
from lrscale.config.recipe import Recipe
from lrscale.launch.planning import plan_of
from lrscale.plan.fit import overflow, suggestions
from lrscale.plan.gathering import gather
from lrscale.plan.layout import Layout, layout_of
from lrscale.plan.memory import cache_positions, memory_plan
from lrscale.plan.model_dims import known_dims
from lrscale.plan.topology import collective_timeout_s

KNOWN = known_dims()
LLAMA = KNOWN["meta-llama/Llama-3.3-70B-Instruct"]


OFF = "model.gradient_checkpointing=false"


def large(nodes: int, *overrides: str) -> Recipe:
    return load_recipe(["llama3-70b-8n8g"], [f"cluster.nodes={nodes}", *overrides]).recipe


@pytest.mark.parametrize(("nodes", "gib"), [(2, 65.7), (4, 32.9), (8, 16.4), (16, 8.2)])
def test_states_of_70b(nodes: int, gib: float) -> None:
    """16 bytes a parameter over all ranks: bf16 weights and gradients, fp32 masters and two moments."""
    states = memory_plan(large(nodes), LLAMA).states
    projector = 16 * LLAMA.projector_parameters(3) / (nodes * 8) / 2**30
    assert states - projector == pytest.approx(gib, abs=0.06)


def test_offload_and_wider_gradients_move_what_they_should() -> None:
    plain, offloaded = memory_plan(large(4), LLAMA), memory_plan(large(4, "parallel.offload_optimizer=true"), LLAMA)
    assert offloaded.states == pytest.approx(plain.states * 2 / 16)
    assert offloaded.host_per_node > plain.host_per_node + 300
    wider = memory_plan(large(4, "parallel.fp32_gradients=true"), LLAMA)
    assert wider.states == pytest.approx(plain.states * 18 / 16)


def test_eight_nodes_are_enough_and_two_are_not() -> None:
    assert memory_plan(large(8), LLAMA).peak < 80 < memory_plan(large(2), LLAMA).peak


def test_checkpointing_is_worth_it() -> None:
    """Locks out a plan that calls 70B trainable without it."""
    parts = [memory_plan(recipe, LLAMA).phase("update").part("activations") for recipe in (large(8, OFF), large(8))]
    assert parts[0] > 10 * parts[1]


def test_auto_gather_is_decided_by_size() -> None:
    assert gather(large(8), LLAMA) == "per_layer"
    assert gather(load_recipe().recipe, KNOWN["builtin:tiny"]) == "whole"


def test_ranks_wait_as_long_as_a_slow_file_system_reads() -> None:
    """Locks out DeepSpeed's ten minutes, which end the start of a large model in mid-load."""
    assert collective_timeout_s(large(8), 135.0) == 3600.0
    assert collective_timeout_s(large(8, "cluster.read_gib_s=0.05"), 135.0) == 6000.0


def engines(nodes: int, *overrides: str, rollout_nodes: int = 0) -> tuple[Recipe, Layout]:
    recipe = large(nodes, *overrides)
    return recipe, layout_of(recipe, engine="vllm", rollout_nodes=rollout_nodes, tensor_parallel=8)


def test_an_engine_beside_the_trainer_takes_its_weights_and_gives_back_what_is_parked() -> None:
    """Locks out a colocated plan without the second copy of the weights, and parking that frees nothing."""
    recipe, layout = engines(8)
    rollout = memory_plan(recipe, LLAMA, layout).phase("rollout")
    assert rollout.part("engine weights") == pytest.approx(2 * 72.67e9 / 8 / 2**30, rel=0.001)
    parked_recipe, _ = engines(8, "parallel.offload_between_phases=true")
    parked = memory_plan(parked_recipe, LLAMA, layout).phase("rollout")
    assert parked.part("states") == pytest.approx(rollout.part("states") * 4 / 16)
    assert parked.host == pytest.approx(8 * (rollout.part("states") - parked.part("states")))


def test_engines_of_their_own_have_no_trainer_beside_them() -> None:
    recipe, layout = engines(8, rollout_nodes=2)
    rollout = memory_plan(recipe, LLAMA, layout).phase("rollout")
    assert rollout.gpus == "rollout" and not rollout.part("states")
    machine = load_machine()
    beside = cache_positions(recipe, LLAMA, engines(8)[1], machine)
    assert cache_positions(recipe, LLAMA, layout, machine) > beside > 100_000


def test_the_cache_counts_latents_and_what_the_heads_allow() -> None:
    """A position takes 2 x 80 layers x 8 heads x 128 x 2 bytes over 8 GPUs; 16 GPUs would hold copies of the 8 heads."""
    recipe, layout = engines(8, rollout_nodes=2)
    assert LLAMA.kv_bytes_per_token(2) == 327_680
    free = 0.9 * 80 * 2**30 - 2 * 72.6676e9 / 8 - 3 * 2**30
    assert cache_positions(recipe, LLAMA, layout, load_machine()) == pytest.approx(free * 8 / 327_680, rel=0.001)


@pytest.mark.parametrize(
    ("nodes", "overrides", "phase", "part"),
    [
        (2, [], "projector SFT", "states"),
        (8, [OFF], "projector SFT", "activations"),
        (8, ["rollout.batch_rows=999"], "", ""),
    ],
)
def test_what_does_not_fit_is_named_and_what_helps_is_tried(
    nodes: int, overrides: list[str], phase: str, part: str
) -> None:
    """Locks out advice that was never worked out: with each suggestion the recipe does fit."""
    recipe, machine = large(nodes, *overrides), load_machine()
    found = overflow(memory_plan(recipe, LLAMA), recipe)
    assert (found is None) == (not phase)
    if found is None:
        return
    assert (found.phase.name, found.part) == (phase, part)
    helps = suggestions(recipe, LLAMA, layout_of(recipe), machine)
    assert helps
    for one in helps:
        keys = [option.removeprefix("--set ").replace("--nodes ", "cluster.nodes=") for option in one.options]
        changed = large(nodes, *overrides, *keys)
        assert memory_plan(changed, LLAMA).peak == pytest.approx(one.peak) and one.peak <= 80.01


def test_gradients_of_engines_without_deepspeed_are_there_only_while_they_are_needed() -> None:
    """Locks out the shipped recipe of one GPU called too large: no gradient is held while it decodes."""
    recipe = load_recipe(["qwen3-4b-1gpu"]).recipe
    plan = memory_plan(recipe, KNOWN["Qwen/Qwen3-4B"])
    assert plan.phase("rollout").part("states") == pytest.approx(plan.phase("update").part("states") * 14 / 18)
    assert overflow(plan, recipe) is None


def test_the_reference_of_a_kl_term_stays_beside_the_policy() -> None:
    plain, frozen = large(8), large(8, "stages.rl.kl.coefficient=0.05")
    for name in ("rollout", "log-probs", "update", "publish", "checkpoint"):
        more = memory_plan(frozen, LLAMA).phase(name).total - memory_plan(plain, LLAMA).phase(name).total
        assert more == pytest.approx(2 * 72.67e9 / 64 / 2**30, rel=0.02), name
    assert not memory_plan(frozen, LLAMA).phase("projector SFT").part("reference"), "it is loaded when RL starts"


def test_weights_for_engines_lie_in_the_memory_of_their_node() -> None:
    """Locks out a node that runs out of shared memory while weights are published."""
    recipe, layout = engines(8)
    assert memory_plan(recipe, LLAMA, layout).phase("publish").host == pytest.approx(2 * 72.67e9 / 2**30, rel=0.001)
    small = large(8, "cluster.memory=100G")
    over = overflow(memory_plan(small, LLAMA, layout), small)
    assert over is not None and over.host and (over.phase.name, over.limit) == ("publish", 100.0)


def test_a_frozen_base_that_runs_several_times_stays_gathered() -> None:
    """DeepSpeed releases it when the backward pass is through: all of it where layers are not checkpointed."""
    whole = 2 * 72.67e9 / 2**30
    assert memory_plan(large(8, OFF), LLAMA).phase("projector SFT").part("live") == pytest.approx(whole, rel=0.001)
    assert memory_plan(large(8), LLAMA).phase("projector SFT").part("live") < whole / 10


def test_what_a_deepspeed_file_offloads_is_offloaded() -> None:
    """Locks out a plan that reads the recipe alone: a file may offload by itself."""
    machine = load_machine()
    by_file = plan_of(load_recipe(["llama3-70b-8n8g"], ["parallel.ds_config=zero3_offload"]), machine)
    by_recipe = plan_of(
        load_recipe(["llama3-70b-8n8g"], ["parallel.offload_optimizer=true", "parallel.offload_parameters=true"]),
        machine,
    )
    assert by_file.memory.states == by_recipe.memory.states < 0.1


def test_shared_prompts_take_another_gradient_where_they_are_shared() -> None:
    """Locks out an update that the plan calls possible and that ends out of memory; and room for what never happens."""
    four = KNOWN["Qwen/Qwen3-4B"]
    shared = load_recipe(["qwen3-4b-1gpu"], ["optimisation.share_prompts=true"]).recipe
    assert memory_plan(shared, four).phase("update").part("shared prompts") > 2 * four.parameters / 2**30
    sharded = memory_plan(large(8, "optimisation.share_prompts=true"), LLAMA)
    assert sharded.phase("update").part("shared prompts") == 0.0
