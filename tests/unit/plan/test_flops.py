"""Operations of forwards and updates, against torch's own count on the real model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lrscale.latent import LatentPolicy
from lrscale.plan.flops import flops
from lrscale.plan.model_dims import read_dims
from tests.unit.latent.tiny_models import tiny_tokenizer

ROWS, TOKENS = 2, 48
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 320,
    "head_dim": 16,
    "tie_word_embeddings": False,
}


def model_of(kind: str, **keys: object) -> tuple[PreTrainedModel, dict[str, object]]:
    torch.manual_seed(0)
    config = {"model_type": kind, **SMALL, **keys}
    settings = AutoConfig.for_model(kind, **{key: value for key, value in config.items() if key != "model_type"})
    # Eager attention and experts: products one by one, all of them counted.
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    if "num_experts_per_tok" in keys:
        model.set_experts_implementation("eager")
    return model, config


KINDS = {
    "llama": {"num_key_value_heads": 8},
    "qwen3": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 4, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "decoder_sparse_step": 1, "mlp_only_layers": [0],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_and_backward_of_each_kind(kind: str) -> None:
    """Locks out grouped queries counted as whole ones, and a mixture counted by all of its experts."""
    model, config = model_of(kind, **KINDS[kind])
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.randint(0, 320, (ROWS, TOKENS)), use_cache=False).logits.sum().backward()
    one = flops(read_dims(config), TOKENS)
    planned = ROWS * (one.training(checkpointing=False) - one.head)  # here the head is not computed once more
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_of_the_policy(*, checkpointing: bool) -> None:
    """Locks out a forgotten recomputation: of layers, and of the head's chunks; products of `replay` as RL runs it."""
    model, config = model_of("llama", num_key_value_heads=2)
    policy = LatentPolicy.from_pretrained(model, tiny_tokenizer())
    if checkpointing:
        policy.enable_checkpointing()
    ids = torch.randint(40, 90, (ROWS, TOKENS))
    scored = torch.zeros_like(ids)
    scored[:, TOKENS // 2 :] = 1
    policy.model.requires_grad_(True)
    counter = FlopCounterMode(display=False)
    with counter:
        out = policy.replay(ids, torch.ones_like(ids), [torch.zeros(0, 64)] * ROWS)
        policy.token_logprobs(out.hidden_BTH, ids, where_BT=scored).sum().backward()
    planned = ROWS * flops(read_dims(config), TOKENS, scored=TOKENS // 2).training(checkpointing=checkpointing)
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.02)


def test_kernels_that_skip_what_is_masked_do_half_of_the_attention() -> None:
    dims = read_dims({"model_type": "llama", **SMALL})
    assert flops(dims, 100, causal=True).attention == flops(dims, 100).attention / 2
    assert flops(dims, 100, causal=True).layers == flops(dims, 100).layers
