"""A policy that is sharded from its first parameter on (FSDP2): no rank ever holds, or reads, the whole model.

config -> model without storage -> fully_shard -> storage for this rank's rows alone
       -> each rank reads its own flat range of every tensor from the safetensors files
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lrscale.config.model import ModelConfig, ProjectorConfig
from lrscale.latent import LatentPolicy
from lrscale.latent.hf_layout import PROJECTOR_PREFIX, weight_files
from lrscale.parallel.fsdp2 import local_range, shard_policy
from lrscale.parallel.shards import Tensors, WholeFiles
from lrscale.parallel.skeleton import skeleton
from lrscale.parallel.stored_names import block_tensor, has_trained_projector, name_of, projector_files, stored_names


@torch.no_grad()
def load_fsdp2(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelConfig,
    projector: ProjectorConfig,
    *,
    device: torch.device,
) -> LatentPolicy:
    """The policy of a recipe, sharded over all ranks; `torch.distributed` is initialised.

    Raises:
        ValueError: tensors that the model needs are missing or of another shape, the files are no safetensors,
            or an option does not go with FSDP2.
    """
    if model.add_marker_tokens:
        raise ValueError(
            "model.add_marker_tokens does not go with parallel.kind fsdp2: add them once in one process "
            "(LatentPolicy.from_pretrained(path, add_marker_tokens=True).save_pretrained(folder)) and train from there"
        )
    tensors = WholeFiles([*weight_files(source), *projector_files(projector)])
    policy = skeleton(source, tokenizer, model, projector)
    base, made = policy.model, policy.projector
    names = stored_names(base, tensors, lambda parameter: parameter.shape)
    mlp_name = name_of(base, policy.backbone.last_mlp())
    trained = has_trained_projector(source, projector)
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    shard_policy(policy, device_type=device.type)
    policy.to_empty(device=device)
    for name, buffer in policy.named_buffers():
        buffer.copy_(buffers[name])
    for name, parameter in base.named_parameters():
        if name in names:
            _fill(parameter, tensors, names[name])
    for index, block in enumerate(made):
        for name, parameter in block.named_parameters():
            _fill(parameter, tensors, block_tensor(names, mlp_name, index, name, trained=trained))
    if made.gain is not None and trained:
        _fill(made.gain, tensors, f"{PROJECTOR_PREFIX}gain")
    elif made.gain is not None:
        made.gain.to_local().fill_(policy.backbone.embedding_rms())
    return policy


def _fill(parameter: nn.Parameter, tensors: Tensors, name: str) -> None:
    start, stop = local_range(parameter)
    if stop > start:
        parameter.to_local().view(-1).copy_(tensors.read(name, start, stop))
