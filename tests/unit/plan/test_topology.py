"""Ranks, and the sequences of a step on them: every derived number follows the number of nodes."""

from __future__ import annotations

import pytest

from lrscale.config.load import load_recipe
from lrscale.config.recipe import Recipe
from lrscale.plan.accelerate import accelerate_yaml
from lrscale.plan.duration import duration_s
from lrscale.plan.summary import gpu_hours, plan_lines, plan_values
from lrscale.plan.topology import batch_plan, dividing_nodes, topology

ROLES = "cluster.split={roles: [{name: rollout, nodes: 2, command: sleep 9}]}"


def large(nodes: int, *overrides: str) -> Recipe:
    return load_recipe(["llama3-70b-8n8g"], [f"cluster.nodes={nodes}", *overrides]).recipe


@pytest.mark.parametrize("nodes", [1, 2, 4, 6, 8, 12])
def test_the_batch_adds_up_whatever_the_nodes(nodes: int) -> None:
    batch = batch_plan(large(nodes))
    assert batch.micro * batch.accumulation * batch.ranks == batch.sequences == 768
    assert batch.ranks == nodes * 8


def test_longer_micro_batches_take_more_sequences() -> None:
    """10,240 positions each: two go into 20,480, and no third one that would not divide."""
    batch = batch_plan(large(8, "optimisation.micro_batch_tokens=40000"))
    assert (batch.micro, batch.accumulation) == (3, 4)
    batch = batch_plan(large(8, "optimisation.micro_batch_tokens=60000"))
    assert (batch.micro, batch.accumulation) == (4, 3)


def test_what_does_not_divide_is_named_factor_by_factor() -> None:
    with pytest.raises(ValueError) as caught:
        batch_plan(large(7))
    for words in ("768 sequences", "prompts_per_step 48", "group_size 16", "56 ranks", "cluster.nodes 7 x 8 a node"):
        assert words in str(caught.value)
    assert dividing_nodes(large(7)) == [6, 8]


def test_roles_come_on_top() -> None:
    there = topology(large(8, ROLES))
    assert (there.world_size, there.other_nodes, there.gpus, there.roles) == (64, 2, 80, (("rollout", 2),))
    assert gpu_hours(large(8, ROLES)) == 80 * 48
    values = plan_values(large(8, ROLES), None, None, None)
    assert values["roles"] == {"train": 8, "rollout": 2} and values["gpu_gib"] is None
    assert any("train 8, rollout 2 nodes" in line for line in plan_lines(large(8, ROLES), None, None, None))


def test_cpus_cost_no_gpu_hours() -> None:
    assert gpu_hours(large(8, "model.device=cpu", "parallel.ranks_per_node=2")) is None


@pytest.mark.parametrize("text", ["", "1:2:3:4", "x", "-1", "1-"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no time"):
        duration_s(text)


def test_the_launcher_file_says_no_more_than_accelerate_reads() -> None:
    """Locks out mixed_precision beside a DeepSpeed file, pdsh, and keys that accelerate ignores without a word."""
    text = accelerate_yaml(8, 8)
    assert "num_machines: 8" in text and "num_processes: 64" in text and "multinode_launcher: standard" in text
    assert not any(word in text for word in ("rdzv", "same_network", "bf16", "main_process"))
