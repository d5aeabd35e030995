"""What vLLM's entry point `vllm.general_plugins` calls in every process of an engine."""

from __future__ import annotations

from lrscale.rollout.vllm.architectures import ARCHITECTURES


def register() -> None:
    """Make the model classes known by name; they are imported where a model is built."""
    from vllm import ModelRegistry  # only vLLM's own processes come here

    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES.values():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"lrscale.rollout.vllm.model:{architecture}")
