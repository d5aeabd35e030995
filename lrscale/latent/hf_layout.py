"""Checkpoints in the Hugging Face layout, the projector's tensors beside the model's.

Tensors `reasoning_projector.{i}.*` and the config fields below are the public reference's
(github.com/Alex-Gurung/LiteReason): its checkpoints load here and ours load there, and a plain
AutoModelForCausalLM ignores what it does not know.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from lrscale.latent.projector import ProjectorKind, ReasoningProjector

PROJECTOR_PREFIX = "reasoning_projector."


@dataclass(frozen=True, slots=True)
class ProjectorFields:
    """What a checkpoint's config says of its projector."""

    layers: int
    max_latent_steps: int
    kind: ProjectorKind = "paper"

    @classmethod
    def read(cls, config: PreTrainedConfig) -> ProjectorFields | None:
        """The fields of a LiteReason checkpoint; None for a plain model."""
        if not getattr(config, "is_litereason_model", False):
            return None
        return cls(
            layers=int(config.litereason_num_reasoning_layers),
            max_latent_steps=int(config.litereason_max_reasoning_steps),
            kind=getattr(config, "litereason_projector_kind", "paper"),
        )

    def write(self, config: PreTrainedConfig) -> None:
        config.is_litereason_model = True
        config.litereason_num_reasoning_layers = self.layers
        config.litereason_max_reasoning_steps = self.max_latent_steps
        config.litereason_projector_kind = self.kind


def load_base(path: str, **kwargs: object) -> PreTrainedModel:
    """AutoModelForCausalLM without remote code, and without a complaint about the projector's tensors.

    Raises:
        ValueError: the checkpoint lacks tensors, or holds some of another shape. transformers would
            make them up and only warn.
    """
    with _quiet_transformers():
        model, found = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    lacking = sorted(found["missing_keys"]) + [str(key) for key in found["mismatched_keys"]]
    if lacking:
        raise ValueError(
            f"{path} lacks {len(lacking)} tensors that {type(model).__name__} needs, or holds them in another shape: "
            f"{', '.join(lacking[:3])}. The checkpoint is damaged or belongs to another config.json"
        )
    return model


def load_projector_tensors(path: str) -> dict[str, Tensor]:
    """The tensors under `reasoning_projector.` of a local folder or hub repository, prefix removed.

    Raises:
        ValueError: the weights hold none, or are not safetensors.
    """
    return projector_tensors(weight_files(path, PROJECTOR_PREFIX), path)


def projector_tensors(files: Iterable[str | Path], path: str) -> dict[str, Tensor]:
    """The tensors under `reasoning_projector.` of safetensors files of `path`. Raises ValueError where there are none."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict: safetensors' handle only has keys()
                if name.startswith(PROJECTOR_PREFIX):
                    tensors[name.removeprefix(PROJECTOR_PREFIX)] = opened.get_tensor(name)
    if not tensors:
        raise ValueError(
            f"{path} is to hold a Reasoning Projector, but its safetensors hold no `{PROJECTOR_PREFIX}*` tensors"
        )
    return tensors


def weight_files(path: str, prefix: str = "") -> list[str]:
    """The safetensors files of a local folder or hub repository that hold tensors named PREFIX*.

    Raises:
        ValueError: there are none.
    """
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        single = cached_file(path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if single is None:
            raise ValueError(f"{path} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
        return [single]
    weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    names = {file for tensor, file in weight_map.items() if tensor.startswith(prefix)}
    return [cached_file(path, name) for name in sorted(names)]


def save_config(model: PreTrainedModel, fields: ProjectorFields, folder: Path) -> None:
    """Write config and generation config, the projector's fields included."""
    fields.write(model.config)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.get_input_embeddings().weight.dtype
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def save_weights(model: PreTrainedModel, projector: ReasoningProjector, folder: Path) -> None:
    """Write sharded safetensors of model and projector together."""
    tensors = _untied(model)
    tensors.update({PROJECTOR_PREFIX + name: tensor for name, tensor in projector.state_dict().items()})
    save_torch_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, folder)


def _untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict with each storage once: transformers ties the others again from the config."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            tensors[name] = tensor
            seen.add(tensor.data_ptr())
    return tensors


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """`float32`, `bfloat16`, `float64` or a torch dtype; None leaves the checkpoint's own."""
    if name is None or isinstance(name, torch.dtype):
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: given {name!r}, needed a torch dtype such as float32 or bfloat16")
    return dtype
