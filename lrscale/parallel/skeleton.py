"""A policy without weights: its modules on the meta device, its buffers (rotary frequencies) as they are."""

from __future__ import annotations

import copy

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from lrscale.config.model import ModelConfig, ProjectorConfig
from lrscale.latent import LatentPolicy, ReasoningProjector
from lrscale.latent.backbone import Backbone
from lrscale.latent.hf_layout import dtype_of
from lrscale.latent.marker_tokens import ensure_marker_tokens
from lrscale.parallel.stored_names import generation_config


@torch.no_grad()
def skeleton(
    source: str, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, projector: ProjectorConfig
) -> LatentPolicy:
    """The recipe's policy as `load_policy` makes it, but for the values of its parameters."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(
            config, attn_implementation=model.attention, dtype=dtype_of(model.dtype), trust_remote_code=False
        )
    base.tie_weights()
    base.generation_config = generation_config(source, config)
    if model.add_marker_tokens:
        ensure_marker_tokens(base, tokenizer)
    backbone = Backbone(base)
    blocks = [copy.deepcopy(backbone.last_mlp()) for _ in range(projector.layers)]
    gain_H = torch.empty(backbone.hidden_size, dtype=backbone.dtype, device="meta")
    made = ReasoningProjector(blocks, kind=projector.kind, gain_H=gain_H if projector.kind != "paper" else None)
    return LatentPolicy(base, tokenizer, made.requires_grad_(True), max_latent_steps=projector.max_latent_steps)
