"""Checkpoints: ours load here, in plain transformers, and carry the public reference's names; theirs load here."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, MixtralConfig, MixtralForCausalLM

from lrscale.latent import LatentPolicy
from tests.unit.latent.tiny_models import ARCHITECTURES, live_policy, padded, random_rows, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("kind", ["paper", "normalised", "residual"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_round_trip_is_exact(architecture, kind, tmp_path):
    policy = live_policy(architecture, torch.float32, kind)
    policy.save_pretrained(tmp_path)
    again = LatentPolicy.from_pretrained(tmp_path)
    ids, mask = padded(random_rows(policy, [[(3, 2)], [(5, 4)]], 12), "right")
    assert torch.equal(policy.expand(ids, mask).logits_BTV, again.expand(ids, mask).logits_BTV)
    assert again.projector.kind == kind and again.max_latent_steps == 32
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert torch.equal(plain(ids).logits, policy.model(ids).logits)


def test_names_and_fields_are_the_references(tmp_path):
    policy = live_policy("llama", torch.float32)
    policy.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    for block in range(3):
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert f"reasoning_projector.{block}.{part}.weight" in names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["is_litereason_model"] is True
    assert (config["litereason_num_reasoning_layers"], config["litereason_max_reasoning_steps"]) == (3, 32)
    assert config["architectures"] == ["LlamaForCausalLM"]


@torch.no_grad()
def test_a_checkpoint_of_the_reference_loads(tmp_path):
    """Written as the reference does: its class's state dict in one file, its three config fields, no kind."""
    source = live_policy("qwen3", torch.float32)
    source.tokenizer.save_pretrained(tmp_path)
    config = source.model.config.to_dict() | {
        "is_litereason_model": True,
        "litereason_num_reasoning_layers": 3,
        "litereason_max_reasoning_steps": 12,
        "architectures": ["LiteReasonQwen3ForCausalLM"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    tensors = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    tensors |= {f"reasoning_projector.{name}": t.clone() for name, t in source.projector.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = LatentPolicy.from_pretrained(tmp_path)
    assert loaded.max_latent_steps == 12 and loaded.projector.kind == "paper"
    hidden = torch.randn(4, 32)
    assert torch.equal(loaded.projector(hidden), source.projector(hidden))
    with pytest.raises(ValueError, match="`paper` projector of 3 blocks"):
        LatentPolicy.from_pretrained(tmp_path, projector_layers=2)


def test_sharded_checkpoints_load(tmp_path):
    policy = live_policy("llama", torch.float32)
    policy.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for part, chunk in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chunk}, tmp_path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chunk, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    again = LatentPolicy.from_pretrained(tmp_path)
    for a, b in zip(policy.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_litereason_checkpoint_without_projector_tensors_is_refused(tmp_path):
    policy = live_policy("llama", torch.float32)
    policy.save_pretrained(tmp_path)
    policy.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hold no `reasoning_projector.\*` tensors"):
        LatentPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_checkpoint_that_lacks_base_tensors_is_refused(damage, tmp_path):
    """transformers fills them with random numbers and warns; a run would train noise."""
    live_policy("llama", torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if damage == "shape":
        tensors[name] = tensor[:5].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*up_proj"):
        LatentPolicy.from_pretrained(tmp_path)


def test_warm_start_copies_the_last_mlp_and_shares_nothing():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    policy = LatentPolicy.from_pretrained(model, tokenizer, projector_layers=2)
    mlp = model.model.layers[-1].mlp
    assert len(policy.projector) == 2
    for block in policy.projector:
        assert torch.equal(block.up_proj.weight, mlp.up_proj.weight)
        assert block.up_proj.weight.data_ptr() != mlp.up_proj.weight.data_ptr()


def test_dropout_is_off_for_good():
    """GPT-2 ships with dropout: a policy in training mode would disagree with its own rollouts."""
    policy = live_policy("gpt2")
    ids, mask = padded(random_rows(policy, [[], []], 8), "right")
    policy.train()
    first, second = (policy.replay(ids, mask, [torch.zeros(0, 32)] * 2).logits_BTV for _ in range(2))
    assert torch.equal(first, second)


def test_models_without_an_mlp_to_clone_are_refused():
    tokenizer = tiny_tokenizer()
    moe = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2,
        )
    )  # fmt: skip
    bert = BertLMHeadModel(
        BertConfig(vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                   is_decoder=True)
    )  # fmt: skip
    for model in (moe, bert):
        with pytest.raises(ValueError, match=r"Llama, Qwen, Mistral, Gemma, GPT-2"):
            LatentPolicy.from_pretrained(model, tokenizer)


@pytest.mark.parametrize("tied", [False, True])
def test_marker_tokens_are_added_as_the_mean_of_their_pieces(tied, tmp_path):
    """Random rows would hide the tags from a model that can read them as text; lost rows would not load again."""
    tokenizer = tiny_tokenizer(tags=False)
    model = tiny_model("llama", len(tokenizer), torch.float32, tie_word_embeddings=tied)
    pieces = tokenizer.encode("<implicit_thought>", add_special_tokens=False)
    means = [w.weight[pieces].mean(0).clone() for w in (model.get_input_embeddings(), model.get_output_embeddings())]
    policy = LatentPolicy.from_pretrained(model, tokenizer, add_marker_tokens=True)
    tag = tokenizer.convert_tokens_to_ids("<implicit_thought>")
    assert policy.detector.has_marker_tokens and len(policy.marker_ids(4)) == 3
    assert torch.equal(model.get_input_embeddings().weight[tag], means[0])
    assert torch.equal(model.get_output_embeddings().weight[tag], means[1])
    policy.save_pretrained(tmp_path)
    again = LatentPolicy.from_pretrained(tmp_path)
    assert again.marker_ids(4) == policy.marker_ids(4)
    assert torch.equal(again.model.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_options_that_do_not_apply_to_a_loaded_model_are_refused():
    """They used to be ignored: a policy in another dtype than the one asked for."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    for options in ({"dtype": "bfloat16"}, {"attention": "eager"}):
        with pytest.raises(ValueError, match="are for paths"):
            LatentPolicy.from_pretrained(model, tokenizer, **options)
    model.config.is_litereason_model = True
    model.config.litereason_num_reasoning_layers = 3
    model.config.litereason_max_reasoning_steps = 8
    with pytest.raises(ValueError, match="hand in its path"):
        LatentPolicy.from_pretrained(model, tokenizer)
