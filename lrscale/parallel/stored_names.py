"""Which tensor of a Hugging Face checkpoint fills which parameter, and a projector's block before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from lrscale.config.model import ProjectorConfig
from lrscale.latent.hf_layout import PROJECTOR_PREFIX, ProjectorFields
from lrscale.latent.projector_folder import ProjectorFolder
from lrscale.parallel.shards import Tensors


def stored_names(
    base: PreTrainedModel, tensors: Tensors, shape_of: Callable[[nn.Parameter], Sequence[int]]
) -> dict[str, str]:
    """Parameter's name to tensor's name: the same, or without the base model's prefix. Tied ones need no tensor.

    Raises:
        ValueError: tensors are missing, or of another shape than `shape_of` says.
    """
    names, prefix = set(tensors.names()), f"{base.base_model_prefix}."
    tied = set(base.all_tied_weights_keys) if base.config.get_text_config().tie_word_embeddings else set()
    found: dict[str, str] = {}
    lacking = []
    for name, parameter in base.named_parameters():
        stored = name if name in names else name.removeprefix(prefix)
        if stored in names and tuple(tensors.shape(stored)) == tuple(shape_of(parameter)):
            found[name] = stored
        elif stored in names:
            lacking.append(f"{name} ({list(tensors.shape(stored))}, needed {list(shape_of(parameter))})")
        elif name not in tied:
            lacking.append(name)
    if lacking:
        raise ValueError(
            f"the checkpoint lacks {len(lacking)} tensors that {type(base).__name__} needs, or holds them in another "
            f"shape: {', '.join(lacking[:3])}. It is damaged or belongs to another config.json; if it was saved in "
            "another layout, load it once with transformers and save it again"
        )
    return found


def block_tensor(names: dict[str, str], mlp_name: str, index: int, parameter: str, *, trained: bool) -> str:
    """The tensor that a projector block's parameter starts from: its own, or the last MLP's for a warm start."""
    return f"{PROJECTOR_PREFIX}{index}.{parameter}" if trained else names[f"{mlp_name}.{parameter}"]


def projector_files(projector: ProjectorConfig) -> list[Path]:
    """Files of a projector that the recipe starts from, besides the base's."""
    return [ProjectorFolder.read(Path(projector.path)).tensors] if projector.path else []


def has_trained_projector(source: str, projector: ProjectorConfig) -> bool:
    """Whether a projector is read, from its own folder or from the model's checkpoint; else it starts as MLP clones."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return bool(projector.path) or ProjectorFields.read(config) is not None


def name_of(model: nn.Module, part: nn.Module) -> str:
    """The name of a module inside another."""
    return next(name for name, module in model.named_modules() if module is part)


def generation_config(source: str, config: PreTrainedConfig) -> GenerationConfig:
    """The checkpoint's, or what its model config implies."""
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # a model need not have one
        return GenerationConfig.from_model_config(config)
