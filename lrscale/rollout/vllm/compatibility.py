"""What is relied upon beyond vLLM's public interface, and what is not served; checked where an engine starts."""

from __future__ import annotations

import inspect
from typing import Any

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests have run with."""
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Attention backends whose metadata carries the block table."""

_METADATA_FIELDS = ("num_actual_tokens", "max_query_len", "query_start_loc", "block_table", "slot_mapping")
_RUNNER_FIELDS = (
    "attn_groups",
    "cache_config.block_size",
    "cache_config.num_gpu_blocks",
    "input_batch.block_table.block_tables",
    "input_batch.num_computed_tokens_cpu",
    "input_batch.req_ids",
    "input_batch.token_ids_cpu",
    "kv_cache_config.kv_cache_groups",
    "model_config.get_hidden_size",
    "requests",
)


class IncompatibleVllm(RuntimeError):
    """This vLLM lacks something that latent steps need."""


def check_interface() -> None:
    """What model and reload touch at all. Raises IncompatibleVllm."""
    import vllm.forward_context as forward_context
    from vllm.config import CUDAGraphMode, VllmConfig
    from vllm.model_executor.model_loader import reload
    from vllm.model_executor.models.llama import LlamaMLP

    _require(forward_context.ForwardContext.__dataclass_fields__, "attn_metadata", "cudagraph_runtime_mode")
    _require(forward_context, "get_forward_context")
    _require(CUDAGraphMode, "FULL", "mixed_mode", "has_full_cudagraphs")
    _require(VllmConfig, "with_hf_config", "use_v2_model_runner")
    _require(reload, "initialize_layerwise_reload", "finalize_layerwise_reload")
    parameters = inspect.signature(LlamaMLP.__init__).parameters
    _require(parameters, "hidden_size", "intermediate_size", "hidden_act", "bias", "prefix")


def check_metadata(metadata: Any) -> None:
    """Raises IncompatibleVllm for an attention backend whose metadata does not tell where positions are kept."""
    _require(metadata, *_METADATA_FIELDS)


def check_runner(runner: Any) -> None:
    """Fields of the model runner, its attention backend and KV cache. Raises IncompatibleVllm."""
    for path in _RUNNER_FIELDS:
        owner = runner
        for name in path.split("."):
            _require(owner, name)
            owner = getattr(owner, name)
    names = {group.backend.get_name() for groups in runner.attn_groups for group in groups}
    if not names <= set(BACKENDS):
        raise IncompatibleVllm(
            f"attention backend {', '.join(sorted(names))}: latent steps need one whose metadata carries the block "
            f"table; start the engine with attention_backend set to one of {', '.join(BACKENDS)}"
        )
    if len(runner.kv_cache_config.kv_cache_groups) != 1:
        raise IncompatibleVllm(
            "the model keeps several kinds of KV cache (sliding-window and full layers): latent steps are not served "
            "for it; roll out with the local engine"
        )
    kernel_blocks = {table.block_size for table in runner.input_batch.block_table.block_tables}
    if kernel_blocks != {runner.cache_config.block_size}:
        raise IncompatibleVllm(
            f"the attention kernel takes blocks of {kernel_blocks} positions, the KV cache has blocks of "
            f"{runner.cache_config.block_size}: set block_size to the kernel's"
        )


def check_config(config: Any, *, records: bool) -> None:
    """What an engine may not be started with. Raises ValueError with what to set instead."""
    parallel, graphs = config.parallel_config, config.compilation_config.cudagraph_mode
    refused = {
        "pipeline_parallel_size above 1: the projector needs the last layer's output as the first one's input": (
            parallel.pipeline_parallel_size > 1
        ),
        "speculative decoding: drafted tokens are verified together, a latent needs the one before it": (
            config.speculative_config is not None
        ),
        "data_parallel_size above 1: engines would run unequal numbers of passes; start one engine each": (
            parallel.data_parallel_size > 1
        ),
        "context parallelism: the block table of one rank does not show every position": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "LoRA: the projector belongs to whole weights": config.lora_config is not None,
        "prompt embeddings: positions are told by token ids": config.model_config.enable_prompt_embeds,
        "KV transfer and offloading: the latents kept beside the KV cache would stay behind": (
            config.kv_transfer_config is not None
        ),
        "microbatching (enable_dbo): a step is read as a whole": bool(getattr(parallel, "enable_dbo", False)),
        "model runner V2, which latent steps have not been run with: set VLLM_USE_V2_MODEL_RUNNER=0": (
            config.use_v2_model_runner
        ),
        "cudagraph_mode FULL: prefills have no fixed shape; set FULL_AND_PIECEWISE, FULL_DECODE_ONLY or PIECEWISE": (
            graphs is not None and graphs.mixed_mode().name == "FULL"
        ),
        "latents cannot be recorded out of full CUDA graphs: set cudagraph_mode to PIECEWISE, or `latents: recompute`": (
            records and graphs is not None and graphs.has_full_cudagraphs()
        ),
    }
    reasons = [reason for reason, given in refused.items() if given]
    if reasons:
        raise ValueError("vLLM with latent steps does not take " + "; nor ".join(reasons))


def _require(owner: Any, *names: str) -> None:
    lacking = [name for name in names if not (name in owner if hasattr(owner, "keys") else hasattr(owner, name))]
    if lacking:
        import vllm

        what = owner if inspect.ismodule(owner) or inspect.isclass(owner) else type(owner)
        raise IncompatibleVllm(
            f"vLLM {vllm.__version__}: {what.__name__} has no {', '.join(lacking)}, which latent steps rely on. Tested "
            f"with vLLM {', '.join(TESTED)}: install that, or roll out with the local engine"
        )
