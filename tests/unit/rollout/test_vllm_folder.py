"""A policy's folder made ready for vLLM; needs no vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lrscale.latent.hf_layout import ProjectorFields
from lrscale.rollout.vllm.engine_options import EngineOptions
from lrscale.rollout.vllm.model_folder import VllmModelFolder, prepare
from tests.unit.latent.tiny_models import live_policy


def test_nothing_is_copied_and_the_trainers_folder_stays_as_it_is(tmp_path: Path) -> None:
    """Locks out a second copy of 140 GB, and a changed config in the checkpoint."""
    policy = live_policy("llama", torch.float32, "normalised")
    policy.save_pretrained(tmp_path / "policy")
    before = {file.name: file.read_bytes() for file in (tmp_path / "policy").iterdir()}
    for _ in range(2):  # a second time is a new one in the place of the first
        made = prepare(tmp_path / "policy", tmp_path / "served")
    assert made == VllmModelFolder.read(tmp_path / "served")
    assert {file.name: file.read_bytes() for file in (tmp_path / "policy").iterdir()} == before
    assert sorted(file.name for file in made.path.iterdir()) == sorted(before)
    for file in made.path.iterdir():
        assert file.name == "config.json" or file.samefile(tmp_path / "policy" / file.name)
    config = AutoConfig.from_pretrained(made.path)
    assert config.architectures == ["LiteReasonLlamaForCausalLM"]
    vocabulary = policy.backbone.vocabulary
    assert (config.vocab_size, config.latent_token_id, made.latent_token_id) == (vocabulary + 1, vocabulary, vocabulary)
    assert ProjectorFields.read(config) == policy.projector_fields


def test_what_vllm_cannot_serve_is_refused(tmp_path: Path) -> None:
    live_policy("gemma", torch.float32).save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match=r"holds a GemmaForCausalLM; .*local engine"):
        prepare(tmp_path / "gemma", tmp_path / "served")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="holds no Reasoning Projector"):
        prepare(tmp_path / "plain", tmp_path / "served")
    live_policy("llama", torch.float32).save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="was not made for vLLM"):
        prepare(tmp_path / "policy", tmp_path / "plain")
    assert not (tmp_path / "served").exists()


def test_engine_options_refuse_what_they_do_not_know() -> None:
    options = EngineOptions(latents_folder="/dev/shm/x")
    assert EngineOptions.read(options.additional_config()) == options
    assert EngineOptions.read({}) == EngineOptions()
    with pytest.raises(ValueError, match="has no option 'latents'; it has latents_folder, fixed_decode"):
        EngineOptions.read({"lrscale": {"latents": True}})
