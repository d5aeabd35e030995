"""Tiny random models that write markers of their own accord, each with a live projector.

vLLM's CPU attention takes heads of 32 or more, so these are a little wider than the other tests' models. To make
a random model write markers, three of its H dimensions carry one bit each, put there by an embedding and read by
the head: some letters are followed by the opening tag, the tag by one of the digits 1 to 5 (which one hangs on
the rest of the state), a digit by the closing tag. Nothing else in the model writes to these dimensions.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lrscale.latent import LatentPolicy
from lrscale.latent.projector import ProjectorKind
from tests.unit.latent.tiny_models import TAGS, _calibrate, tiny_tokenizer

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
HIDDEN = 64
LETTERS_THAT_LEAD_TO_A_MARKER = "bdfhjlnprtvxz"
DIGITS = "12345"
BITS = 3


def talkative_policy(
    architecture: str, projector_kind: ProjectorKind = "paper", *, layers: int = 3, seed: int = 0, **overrides: object
) -> LatentPolicy:
    """A float32 policy. Its projector's latents have the scale of embeddings."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = CONFIGS[architecture](
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **overrides,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    _make_talkative(model, tokenizer)
    policy = LatentPolicy.from_pretrained(model, tokenizer, layers, projector_kind=projector_kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.projector.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator) * parameter.std())
        for block in policy.projector:
            block.down_proj.weight[:BITS] = 0
        if projector_kind == "paper":
            _calibrate(policy)
    return policy


@torch.no_grad()
def _make_talkative(model: PreTrainedModel, tokenizer: object) -> None:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tokens = tokenizer.convert_tokens_to_ids
    open_id, close_id = tokens(TAGS)
    chain = [
        (tokens(list(LETTERS_THAT_LEAD_TO_A_MARKER)), [open_id]),
        ([open_id], tokens(list(DIGITS))),
        (tokens(list(DIGITS)), [close_id]),
    ]
    head[tokens(list("abcdefghijklmnopqrstuvwxyz"))] *= 1.5  # mostly letters are written
    for dimension, (before, after) in enumerate(chain):
        embedding[:, dimension] = 0
        head[:, dimension] = 0
        embedding[before, dimension] = 4.0
        head[after, dimension] = 4.0
    for layer in model.base_model.layers:
        layer.self_attn.o_proj.weight[:BITS] = 0
        layer.mlp.down_proj.weight[:BITS] = 0
    embedding[tokenizer.eos_token_id] *= 0.1
    head[tokenizer.eos_token_id] *= 0.1
