"""Sizes of models: counted tensor by tensor as transformers builds them, and refused where a config does not tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lrscale
from lrscale.config.shipped import ShippedModel, shipped_models
from lrscale.latent import ReasoningProjector
from lrscale.plan.model_config import ModelConfigError
from lrscale.plan.model_dims import dims_of_config, known_dims, read_dims
from lrscale.plan.tensors import model_tensors, projector_tensors
from tests.unit.latent.tiny_models import tiny_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 50, "vocab_size": 100}
PUBLISHED = {
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "google/gemma-2-9b": 9_241_705_984,
    "gpt2": 124_439_808,
}
"""What the models' own pages or files of weights say."""


@pytest.mark.parametrize("model", shipped_models(), ids=lambda model: model.ids[0])
def test_every_shipped_model_is_built_of_the_planned_tensors(model: ShippedModel) -> None:
    """Locks out a forgotten bias, head norm, router, tied head or position embedding, and dimensions mistyped so that
    layers do not fit each other, and another number of positions than the runtime would go by."""
    keys = {key: value for key, value in model.config.items() if key != "model_type"}
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(model.config["model_type"], **keys))
    dims = read_dims(model.config)
    assert {tensor.name: tensor.shape for tensor in model_tensors(dims)} == {
        name: tuple(parameter.shape) for name, parameter in built.named_parameters()
    }
    assert dims.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert dims.positions in (None, built.config.get_text_config().max_position_embeddings)


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_are_those_of_the_published_models(model: str) -> None:
    """The control of the test above: shipped dimensions of another size would pass it."""
    assert known_dims()[model].parameters == PUBLISHED[model]


def test_a_mixture_counts_what_a_token_passes() -> None:
    """Qwen3-30B-A3B and Mixtral 8x7B, by their names and pages: 3.3 B and 12.9 B."""
    assert known_dims()["Qwen/Qwen3-30B-A3B"].active_parameters == pytest.approx(3.35e9, rel=0.01)
    assert known_dims()["mistralai/Mixtral-8x7B-v0.1"].active_parameters == pytest.approx(12.9e9, rel=0.01)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["paper", "normalised", "residual"])
def test_the_projector_is_built_of_the_planned_tensors(architecture: str, kind: Any) -> None:
    """Locks out a gain that is not counted, and a plain MLP counted as a gated one."""
    model = tiny_model(architecture, 260)
    blocks = model.model.layers if architecture == "llama" else model.transformer.h
    built = ReasoningProjector.from_mlp(blocks[-1].mlp, layers=3, hidden_size=32, kind=kind)
    dims = read_dims(model.config.to_dict())
    planned = {tensor.name: tensor.shape for tensor in projector_tensors(dims, 3, kind)}
    real = {f"reasoning_projector.{name}": tuple(parameter.shape) for name, parameter in built.named_parameters()}
    assert planned == real
    assert dims.projector_parameters(3, kind) == sum(parameter.numel() for parameter in built.parameters())


def test_the_tiny_model_is_what_its_file_says() -> None:
    """Locks out data that drifts from what is shipped beside it."""
    folder = Path(lrscale.__file__).parent / "tasks" / "assets" / "tiny_base"
    assert read_dims(json.loads((folder / "config.json").read_text())) == known_dims()["builtin:tiny"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads, which is 3"),
        ({"num_attention_heads": 7}, "hidden_size is 64, no multiple of num_attention_heads, which is 7"),
        ({"model_type": "mixtral"}, "num_local_experts is missing, num_experts_per_tok is missing"),
        ({"model_type": "gpt2"}, "n_embd is missing"),
        ({"kv_lora_rank": 512}, "kv_lora_rank, a kind of block that the plan does not count"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads is '8' (needed: a whole number, at least 1, at most 10000"),
        ({"num_key_value_heads": [8]}, "num_key_value_heads is [8]"),
        ({"num_key_value_heads": -4}, "num_key_value_heads is -4"),
        ({"head_dim": "128"}, "head_dim is '128'"),
        ({"head_dim": 127.5}, "head_dim is 127.5"),
        ({"head_dim": -128, "mlp_bias": 1}, "head_dim is -128"),
        ({"head_dim": -128, "mlp_bias": 1}, "mlp_bias is 1 (needed: true or false)"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 10**12}, "at most 1000000)"),
        ({"vocab_size": 10**9}, "at most 100000000)"),
        ({"max_position_embeddings": "4k"}, "max_position_embeddings is '4k'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        (GPT2 | {"n_inner": "3072"}, "n_inner is '3072'"),
        (GPT2 | {"n_head": 7}, "n_embd is 64, no multiple of n_head, which is 7"),
        (QWEN_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (QWEN_MOE | {"decoder_sparse_step": "1"}, "decoder_sparse_step is '1'"),
        (QWEN_MOE | {"mlp_only_layers": 3}, "mlp_only_layers is 3 (needed: a list, each element a whole number"),
        (QWEN_MOE | {"mlp_only_layers": [0, "1"]}, "mlp_only_layers is [0, '1']"),
        (QWEN_MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than the 8 experts"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than the 8 experts"),
        (MIXTRAL | {"model_type": "gpt_oss"}, "model_type gpt_oss has num_local_experts, a kind of block"),
        (MIXTRAL | {"model_type": "llama4_text"}, "model_type llama4_text has num_local_experts, a kind of block"),
        (QWEN_MOE | {"model_type": "olmoe"}, "model_type olmoe has num_experts, a kind of block"),
        (QWEN_MOE | {"model_type": "qwen9_moe"}, "model_type qwen9_moe has num_experts, a kind of block"),
        ({"model_type": "deepseek", "n_routed_experts": 64}, "model_type deepseek has n_routed_experts"),
    ],
)
def test_a_config_that_does_not_tell_is_refused_by_key(change: dict[str, Any], said: str) -> None:
    """Locks out tracebacks, numbers that are converted or taken as they are, and mixtures counted as dense models."""
    with pytest.raises(ModelConfigError) as caught:
        read_dims(LLAMA | change)
    assert said in str(caught.value)
    assert dims_of_config(LLAMA | change) is None


def test_null_is_as_good_as_left_out() -> None:
    """Locks out a refusal of what transformers itself writes."""
    nulls = dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings", "num_local_experts"))
    assert read_dims(LLAMA | nulls) == read_dims(LLAMA)
    assert read_dims(GPT2 | {"n_inner": None}).intermediate == 256


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LLAMA, None),
        (GPT2, 50),
        (LLAMA | {"max_position_embeddings": 50, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 50),
    ],
)
def test_positions_are_the_number_that_the_config_writes(config: dict[str, Any], positions: int | None) -> None:
    """As `Backbone.check_positions` has it. Locks out a limit that is multiplied by the factor of rope scaling."""
    assert read_dims(config).positions == positions


@pytest.mark.parametrize(
    ("dense", "ends_so"), [({}, True), ({"mlp_only_layers": [0]}, True), ({"mlp_only_layers": [1]}, False)]
)
def test_a_mixture_may_still_end_in_an_mlp(*, dense: dict[str, Any], ends_so: bool) -> None:
    """Locks out a projector promised where there is no last MLP to clone it from."""
    assert read_dims(QWEN_MOE | dense).ends_in_mixture is ends_so and not read_dims(LLAMA).ends_in_mixture


def test_a_kind_that_nobody_counted_is_said_to_be_a_guess() -> None:
    assert read_dims(LLAMA).exact and not read_dims(LLAMA | {"model_type": "olmo9"}).exact
