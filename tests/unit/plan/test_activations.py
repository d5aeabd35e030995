"""What autograd saves of transformers' own layers, against the plan's count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrscale.plan.activations import kept_bytes
from lrscale.plan.model_dims import read_dims

ROWS, LENGTH = 2, 128
SIZES = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "mistral": SIZES,
    "qwen3": SIZES | {"head_dim": 32},
    "gemma": SIZES | {"head_dim": 32},
    "gemma2": SIZES | {"head_dim": 32},
    "gemma3_text": SIZES | {"head_dim": 32},
    "qwen3_moe": SIZES | EXPERTS | {"head_dim": 32, "mlp_only_layers": []},
    "qwen2_moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 192},
    "mixtral": SIZES | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 128, "n_head": 4, "n_positions": 256, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_what_is_counted(kind: str, dtype: torch.dtype) -> None:
    """Locks out a rule of thumb in its place, which is off by a third between kinds."""
    layers = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    configs = [AutoConfig.for_model(kind, vocab_size=64, **KINDS[kind], **{layers: count}) for count in (1, 3)]
    saved = [_saved_bytes(config, dtype) for config in configs]
    of_a_layer = (saved[1] - saved[0]) / 2 / (ROWS * LENGTH)
    planned = kept_bytes(read_dims(configs[0].to_dict()), dtype.itemsize)
    assert planned == pytest.approx(of_a_layer, rel=0.03)


def _saved_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of the storages that a forward of the decoder keeps, weights and buffers left out."""
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held = []  # a storage that is freed may lend its address to another one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    embeds = torch.randn(ROWS, LENGTH, config.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(inputs_embeds=embeds, use_cache=False)
    return sum(kept.values())
