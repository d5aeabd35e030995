"""A whole copy of a sharded policy, for decoding without a collective a step.

Its memory is the model's, on every rank; `rollout.local` copies the trained weights into it.
"""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from lrscale.latent import LatentPolicy, ReasoningProjector
from lrscale.latent.backbone import Backbone


def whole_bytes(policy: LatentPolicy) -> int:
    """What a whole copy of the weights takes."""
    return sum(
        getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        for parameter in policy.parameters()
    )


def empty_replica(policy: LatentPolicy) -> LatentPolicy:
    """A policy of the same architecture on the same device, its weights still to be filled in."""
    base = policy.model
    with torch.device(policy.device), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(base.config),
            dtype=policy.backbone.dtype,
            attn_implementation=policy.backbone.config._attn_implementation,
            trust_remote_code=False,
        )
    model.tie_weights()
    model.generation_config = copy.deepcopy(base.generation_config)
    backbone = Backbone(model)
    projector = ReasoningProjector.from_mlp(
        backbone.last_mlp(),
        layers=len(policy.projector),
        hidden_size=backbone.hidden_size,
        kind=policy.projector.kind,
    )
    replica = LatentPolicy(
        model, policy.tokenizer, projector, max_latent_steps=policy.max_latent_steps, logits_mib=policy.logits_mib
    )
    return replica.requires_grad_(False)
