"""What the launcher left open in DeepSpeed's configuration is filled in where the model and the device are known."""

from __future__ import annotations

from lrscale.config.load import load_recipe
from lrscale.config.zero3_rules import unsettled
from lrscale.parallel.ds_config import settled
from lrscale.plan.deepspeed import resolve


def test_a_model_that_the_launcher_did_not_find_gets_its_width_from_the_ranks() -> None:
    """Locks out an "auto" that reaches DeepSpeed because the model came from the hub, or the device was left open."""
    overrides = ["parallel.kind=zero3", "parallel.ranks_per_node=2", "model.device=auto"]
    recipe = load_recipe((), overrides).recipe
    zero = {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": "auto"}
    config = resolve({"zero_optimization": zero}, recipe, None, 2)
    assert list(unsettled(config))
    complete = settled(config, recipe.model)
    assert not list(unsettled(complete))
    assert complete["zero_optimization"]["reduce_bucket_size"] == 128 * 128
    assert settled(complete, recipe.model) is complete
