"""A policy that is partitioned from its first parameter on (ZeRO-3): no rank ever holds, or reads, the whole model.

    config -> model inside zero.Init (every parameter partitioned as it is made)
           -> each rank reads its own flat range of every tensor from the safetensors files
           -> projector: a block at a time, read from the checkpoint or cloned from the last MLP

transformers' own loading under ZeRO-3 reads all files into the memory of every rank (eight 70B models a node);
here the files are read once in all, a part by each rank.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import DeepSpeedTensorOverride
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from lrscale.config.model import ModelConfig, ProjectorConfig
from lrscale.latent import LatentPolicy, ReasoningProjector
from lrscale.latent.backbone import Backbone
from lrscale.latent.hf_layout import PROJECTOR_PREFIX, dtype_of, weight_files
from lrscale.parallel.shards import Tensors, WholeFiles
from lrscale.parallel.stored_names import (
    block_tensor,
    generation_config,
    has_trained_projector,
    name_of,
    projector_files,
    stored_names,
)


def load_sharded(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelConfig,
    projector: ProjectorConfig,
    *,
    ds_config: dict[str, Any],
    device: torch.device,
) -> LatentPolicy:
    """The policy of a recipe, partitioned over all ranks; `torch.distributed` is initialised.

    Raises:
        ValueError: tensors that the model needs are missing or of another shape, the files are no safetensors,
            or an option does not go with ZeRO-3.
    """
    if model.add_marker_tokens:
        raise ValueError(
            "model.add_marker_tokens does not go with parallel.kind zero3: add them once in one process "
            "(LatentPolicy.from_pretrained(path, add_marker_tokens=True).save_pretrained(folder)) and train from there"
        )
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    tensors = WholeFiles([*weight_files(source), *projector_files(projector)])
    base = _partitioned_model(config, model, ds_config, device)
    names = stored_names(base, tensors, lambda parameter: parameter.ds_shape)
    for name, parameter in base.named_parameters():
        if name in names:
            fill_partition(parameter, tensors, names[name])
    base.tie_weights()
    base.generation_config = generation_config(source, config)
    trained = has_trained_projector(source, projector)
    blocks = _projector(base, config, projector, _ProjectorSource(tensors, names, trained), ds_config)
    policy = LatentPolicy(base, tokenizer, blocks, max_latent_steps=projector.max_latent_steps)
    _check_partitioned(policy)
    return policy


def _partitioned_model(
    config: PreTrainedConfig, model: ModelConfig, ds_config: dict[str, Any], device: torch.device
) -> PreTrainedModel:
    dtype = dtype_of(model.dtype)
    # The dtype is transformers' to set: zero.Init would narrow the rotary frequencies along with the weights.
    sharding = deepspeed.zero.Init(config_dict_or_path=ds_config, tensor_overrides=[DeepSpeedTensorOverride.device])
    with sharding, no_init_weights():
        base = AutoModelForCausalLM.from_config(
            config, attn_implementation=model.attention, dtype=dtype, trust_remote_code=False
        )
    for module in base.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return base


def fill_partition(parameter: nn.Parameter, tensors: Tensors, name: str) -> None:
    """Read this rank's flat range of a tensor into the parameter's partition."""
    start, stop = partition_range(parameter)
    if stop > start:
        parameter.ds_tensor.data[: stop - start].copy_(tensors.read(name, start, stop))


def partition_range(parameter: nn.Parameter) -> tuple[int, int]:
    """[start, stop) of the flattened tensor that this rank holds; the rest of its partition is padding."""
    size = parameter.ds_tensor.ds_numel
    start = min(size * torch.distributed.get_rank(parameter.ds_process_group), parameter.ds_numel)
    return start, min(start + size, parameter.ds_numel)


@dataclass(frozen=True, slots=True)
class _ProjectorSource:
    """Where a projector's values come from."""

    tensors: Tensors
    names: dict[str, str]
    """The base's parameters to their tensors, for a warm start from its last MLP."""
    trained: bool
    """Whether the tensors hold a projector."""


def _projector(
    base: PreTrainedModel,
    config: PreTrainedConfig,
    projector: ProjectorConfig,
    source: _ProjectorSource,
    ds_config: dict[str, Any],
) -> ReasoningProjector:
    """Blocks of the last MLP's architecture, each filled and partitioned before the next one is made."""
    backbone = Backbone(base)
    mlp_name = name_of(base, backbone.last_mlp())
    tensors, trained = source.tensors, source.trained
    blocks: list[nn.Module] = []
    with torch.device("meta"):
        empty_mlp = Backbone(AutoModelForCausalLM.from_config(config, trust_remote_code=False)).last_mlp()
    for index in range(projector.layers):
        block = copy.deepcopy(empty_mlp).to(backbone.dtype).to_empty(device=backbone.device)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(_whole(tensors, block_tensor(source.names, mlp_name, index, name, trained=trained)))
        deepspeed.zero.Init(module=block, config_dict_or_path=ds_config)
        blocks.append(block)
    gain_H = None
    if projector.kind != "paper":
        gain_H = torch.empty(backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
        gain_H.copy_(_whole(tensors, f"{PROJECTOR_PREFIX}gain")) if trained else gain_H.fill_(_embedding_rms(backbone))
    made = ReasoningProjector(blocks, kind=projector.kind, gain_H=gain_H)
    deepspeed.zero.Init(module=made, config_dict_or_path=ds_config)
    return made


def _whole(tensors: Tensors, name: str) -> Tensor:
    shape = tuple(tensors.shape(name))
    return tensors.read(name, 0, torch.Size(shape).numel()).reshape(shape)


def _embedding_rms(backbone: Backbone) -> float:
    with deepspeed.zero.GatheredParameters(list(backbone.model.get_input_embeddings().parameters())):
        return backbone.embedding_rms()


def _check_partitioned(policy: LatentPolicy) -> None:
    whole = [name for name, parameter in policy.named_parameters() if not hasattr(parameter, "ds_tensor")]
    if whole:
        raise ValueError(
            f"{len(whole)} parameters were not partitioned by ZeRO-3, {whole[0]} for one: every rank would hold them "
            "whole. This is a bug in lrscale, or a model that makes parameters outside of its modules"
        )
