"""New weights into the workers of a running engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lrscale.latent.hf_layout import PROJECTOR_PREFIX


@torch.inference_mode()
def reload_weights(worker: Any, weights: Iterable[tuple[str, Tensor]], *, projector_only: bool) -> None:
    """Take over weights by the names they have in a checkpoint; call it in every worker with the same tensors.

    Goes through vLLM's layer-wise reloading, for on CPU and under quantisation weights are no longer what was
    loaded. KV cache and latents of before stem from the old weights: let no request be under way, and reset the
    engine's prefix cache behind this.

    Args:
        worker: vLLM's worker, in one of its methods.
        weights: all of the model's and the projector's, or the projector's alone.
        projector_only: which of the two.

    Raises:
        ValueError: a name that does not belong there, or one that is lacking.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.model_runner.get_model()
    with set_current_vllm_config(worker.vllm_config):
        part = model.reasoning_projector if projector_only else model
        initialize_layerwise_reload(part)
        try:
            loaded = part.load_weights(_projector_names(weights) if projector_only else weights)
        finally:  # also of weights that break off: vLLM would take the next ones together with these
            finalize_layerwise_reload(part, worker.vllm_config.model_config)
        lacking = {name for name, _ in part.named_parameters()} - loaded
    if model.records is not None:
        model.records.forget_blocks()
    if lacking:
        raise ValueError(f"weights for vLLM: {len(lacking)} tensors were not sent, {min(lacking)} first")


def _projector_names(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if not name.startswith(PROJECTOR_PREFIX):
            raise ValueError(f"weights for vLLM: {name} is none of the projector's tensors")
        yield name.removeprefix(PROJECTOR_PREFIX), tensor
