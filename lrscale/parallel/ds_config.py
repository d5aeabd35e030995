"""DeepSpeed's configuration of a run: what the launcher could not know of it is filled in by the ranks."""

from __future__ import annotations

from typing import Any

import torch

from lrscale.config.model import ModelConfig
from lrscale.config.zero3_rules import settle, unsettled
from lrscale.parallel.loading import hidden_size_of


def settled(config: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The configuration without any "auto": from the model's width, and from whether there is a GPU.

    ValueError for a model that cannot be had.
    """
    if not list(unsettled(config)):
        return config
    on_gpu = model.device != "cpu" and torch.cuda.is_available()
    return settle(config, hidden_size=hidden_size_of(model), on_gpu=on_gpu)
