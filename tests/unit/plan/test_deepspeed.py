"""DeepSpeed's configuration: every "auto" becomes the number that it would be by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lrscale.config.load import load_recipe
from lrscale.config.recipe import Recipe
from lrscale.config.shipped import shipped_ds_configs
from lrscale.config.zero3_rules import settle, unsettled
from lrscale.plan.deepspeed import resolve


def template(name: str = "zero3") -> dict[str, Any]:
    return json.loads(shipped_ds_configs()[name].read_text())


def recipe(*overrides: str, name: str = "tiny-cpu") -> Recipe:
    small = ["parallel.kind=zero3", "parallel.ranks_per_node=2"] if name == "tiny-cpu" else []
    return load_recipe([name], [*small, *overrides]).recipe


def test_the_large_recipe_gets_the_numbers_computed_by_hand() -> None:
    """Locks out drift from the reviewed 70B values: H = 8192, 8 nodes of 8."""
    config = resolve(template(), recipe(name="llama3-70b-8n8g"), 8192, 64)
    zero = config["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (67_108_864, 60_397_977)
    assert zero["stage3_param_persistence_threshold"] == 81_920
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (64, 1)
    assert (config["bf16"], config["communication_data_type"]) == ({"enabled": True}, "bf16")
    assert zero["overlap_comm"] is True and "offload_optimizer" not in zero and "offload_param" not in zero


def test_on_a_cpu_nothing_needs_a_gpu_even_where_the_file_says_so() -> None:
    """Locks out DeepSpeed's defaults, which are true for keys that are absent."""
    own = template()
    del own["zero_optimization"]["overlap_comm"]
    config = resolve(own, recipe("parallel.offload_optimizer=true"), 96, 2)
    zero = config["zero_optimization"]
    assert zero["overlap_comm"] is False
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert (config["bf16"], config["data_types"]) == ({"enabled": False}, {"grad_accum_dtype": "fp32"})


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
@pytest.mark.parametrize("overrides", [[], ["model.dtype=bfloat16", "parallel.fp32_gradients=true"]])
def test_shipped_files_resolve_to_the_last_key(name: str, overrides: list[str]) -> None:
    """Locks out an "auto" that reaches DeepSpeed, which takes it for a number or for true."""
    config = resolve(template(name), recipe(*overrides), 96, 2)
    assert not list(unsettled(config))
    assert config["communication_data_type"] == "fp32"
    assert ("offload_param" in config["zero_optimization"]) == (name == "zero3_offload")


def test_what_the_launcher_cannot_know_is_left_to_the_ranks() -> None:
    """Locks out a guess about a model that is not on this machine; the ranks' own rule completes it."""
    config = resolve(template(), recipe("model.device=auto", "parallel.offload_optimizer=true"), None, 2)
    assert set(unsettled(config)) == {
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.overlap_comm",
        "zero_optimization.offload_optimizer.pin_memory",
    }
    completed = settle(config, hidden_size=100, on_gpu=True)
    assert not list(unsettled(completed))
    assert completed["zero_optimization"]["stage3_prefetch_bucket_size"] == 9000
    assert config["zero_optimization"]["reduce_bucket_size"] == "auto"  # the argument is left alone


def test_a_minimal_file_of_ones_own_gets_what_lrscale_needs() -> None:
    config = resolve({"zero_optimization": {"stage": 3}}, recipe(), 96, 2)
    assert config["zero_allow_untested_optimizer"] is True and config["train_batch_size"] == 2
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zero_optimization": {"stage": 2}}, "stage is 2"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, "zero_optimization.sub_group_size"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but this run needs false"),
        ({"train_batch_size": 8}, "train_batch_size is 8, but this run needs 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: lrscale brings its own"),
        ({"aio": {"queue_depth": "auto"}}, "aio.queue_depth"),
    ],
)
def test_files_that_would_fail_or_contradict_the_recipe_are_refused(change: dict[str, Any], words: str) -> None:
    """Locks out a bare assertion from DeepSpeed on every rank, minutes later."""
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        resolve(template() | change, recipe(), 96, 2)


def test_offload_cannot_be_switched_off_by_the_file_and_on_by_the_recipe() -> None:
    own = template()
    own["zero_optimization"]["offload_optimizer"] = {"device": "none"}
    with pytest.raises(ValueError, match=r"parallel\.offload_optimizer is true"):
        resolve(own, recipe("parallel.offload_optimizer=true"), 96, 2)
