"""Sizes of models and the memory they take, against figures that were worked out by hand or published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lrscale
from lrscale.config.load import load_recipe
from lrscale.config.recipe import Recipe
from lrscale.plan.memory import gather, memory_plan
from lrscale.plan.model_dims import dims_of_config, known_dims
from lrscale.plan.topology import collective_timeout_s

KNOWN = known_dims()
LLAMA = KNOWN["meta-llama/Llama-3.3-70B-Instruct"]
TINY = Path(lrscale.__file__).parent / "tasks" / "assets" / "tiny_base"


def large(nodes: int, *overrides: str) -> Recipe:
    return load_recipe(["llama3-70b-8n8g"], [f"cluster.nodes={nodes}", *overrides]).recipe


def test_parameters_are_those_of_the_published_models() -> None:
    """Locks out a forgotten tied head, grouped queries counted in full, missing norms."""
    assert LLAMA.parameters == 70_553_706_496
    assert KNOWN["Qwen/Qwen3-4B"].parameters == 4_022_468_096
    assert KNOWN["meta-llama/Llama-3.1-8B"].parameters == 8_030_261_248
    assert LLAMA.projector_parameters(3) == 2_113_929_216


def test_the_tiny_model_is_what_its_file_says() -> None:
    """The count of the file's tensors is the control: data in code cannot drift from what is shipped."""
    assert dims_of_config(json.loads((TINY / "config.json").read_text())) == KNOWN["builtin:tiny"]
    with (TINY / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    assert KNOWN["builtin:tiny"].parameters == sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes)


def test_a_config_of_another_kind_is_not_guessed_at() -> None:
    assert dims_of_config({"hidden_size": 64}) is None
    assert dims_of_config({}) is None


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
    without = memory_plan(large(8, "model.gradient_checkpointing=false"), LLAMA)
    assert without.activations > 10 * memory_plan(large(8), LLAMA).activations


def test_auto_gather_is_decided_by_size() -> None:
    assert gather(large(8), LLAMA) == "per_layer"
    assert gather(load_recipe().recipe, KNOWN["builtin:tiny"]) == "whole"


def test_ranks_wait_as_long_as_a_slow_file_system_reads() -> None:
    """Locks out DeepSpeed's ten minutes, which end the start of a large model in mid-load."""
    assert collective_timeout_s(large(8), 135.0) == 3600.0
    assert collective_timeout_s(large(8, "cluster.read_gib_s=0.05"), 135.0) == 6000.0
