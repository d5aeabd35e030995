"""An engine of two workers, each with half of every layer and of the projector."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from lrscale.config.optimisation import OptimisationConfig
from lrscale.config.recipe import Recipe
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.single import SingleEngine
from lrscale.rollout.engine import SamplingPlan
from lrscale.rollout.vllm.engine import VllmRollouts
from lrscale.rollout.vllm.transport import Broadcast
from lrscale.stages.rollout_engines import vllm_rollouts
from tests.distributed.programs.engines_by_node import prompts
from tests.vllm.talkative_models import talkative_policy

pytestmark = pytest.mark.slow

ROLLOUT = {"kind": "vllm", "tensor_parallel": 2, "max_new_tokens": 40, "max_model_len": 256, "enforce_eager": True}


def test_two_workers_sample_as_one_process_does(tmp_path: Path):
    """Locks out a projector that is cut wrongly or summed twice, workers with other latents, latents from half of the
    workers, and weights that reach one worker only, by files or by broadcast.
    """
    recipe = Recipe.model_validate({"model": {"device": "cpu"}, "rollout": ROLLOUT})
    engine = SingleEngine(talkative_policy("llama"), OptimisationConfig(), ranks=Ranks())
    with closing(vllm_rollouts(recipe, recipe.rollout, engine, tmp_path, lambda _: None)) as rollouts:
        rollouts.load_weights(engine.full_parameters(), version=1)
        assert_as_local(rollouts)
        with torch.no_grad():
            for parameter in engine.policy.projector.parameters():
                parameter.mul_(0.9)
        publisher = rollouts.publisher
        by_broadcast = Broadcast(publisher.fleet, torch.device("cpu"), workers=2, limit_s=60, timeout_s=300)
        publisher.transport, by_files = by_broadcast, publisher.transport
        rollouts.load_weights(engine.full_parameters("projector"), version=2, projector_only=True)
        assert_as_local(rollouts)
        by_files.close()


def assert_as_local(rollouts: VllmRollouts) -> None:
    policy = rollouts.policy
    given = prompts(policy)
    found = dict(rollouts.generate(given, SamplingPlan(seed=1, temperature=0.0)))
    local = dict(policy.iter_generate(given, max_new_tokens=40, temperature=0.0))
    assert found.keys() == local.keys()
    for index, ours in local.items():
        theirs = found[index]
        assert (theirs.completion_ids, theirs.latent_spans) == (ours.completion_ids, ours.latent_spans)
        assert (theirs.logprobs_T - ours.logprobs_T).abs().max() < 1e-3
        assert torch.allclose(theirs.latents_LH, ours.latents_LH, atol=1e-3, rtol=1e-3)
    assert sum(len(rollout.latents_LH) for rollout in local.values()) > len(given)
