"""The model classes that vLLM loads: its own ones, with latent steps.

The reserved token id is one past the model's vocabulary. vLLM's side of the config counts it in, so that vLLM
accepts it in prompts and samples it; no weight does: the embedding and the head keep the trainer's rows, and
the latent's logit is a column added here. An id inside the vocabulary would have had to be masked, also an
unused one, and the log-probs of all others would no longer be the trainer's.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from lrscale.latent import MarkerDetector
from lrscale.latent.hf_layout import ProjectorFields
from lrscale.rollout.vllm.compatibility import check_config, check_interface, check_runner
from lrscale.rollout.vllm.engine_options import EngineOptions
from lrscale.rollout.vllm.latent_records import LatentRecords
from lrscale.rollout.vllm.latent_steps import FORCED, LatentSteps
from lrscale.rollout.vllm.position_automaton import PositionAutomaton
from lrscale.rollout.vllm.projector import ParallelProjector
from lrscale.rollout.vllm.side_buffers import SideBuffers
from lrscale.rollout.vllm.step import Step


class LatentModel:
    """Mixed into a causal LM of vLLM, in front of it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_interface()
        options = EngineOptions.read(vllm_config.additional_config)
        check_config(vllm_config, records=options.latents_folder is not None)
        served = vllm_config.model_config.hf_config
        fields = ProjectorFields.read(served)
        if fields is None or not hasattr(served, "latent_token_id"):
            raise ValueError(
                f"{vllm_config.model_config.model} is no folder for vLLM: make one of a LiteReason checkpoint with "
                "lrscale.rollout.vllm.model_folder.prepare"
            )
        trained = copy.deepcopy(served)
        trained.vocab_size = served.vocab_size - 1
        super().__init__(vllm_config=vllm_config.with_hf_config(trained), prefix=prefix)
        self.reasoning_projector = ParallelProjector(trained, fields, maybe_prefix(prefix, "reasoning_projector"))
        self.options = options
        self.engine_config = vllm_config
        tokenizer = AutoTokenizer.from_pretrained(vllm_config.model_config.tokenizer, trust_remote_code=False)
        detector = MarkerDetector(tokenizer, fields.max_latent_steps)
        self.automaton = PositionAutomaton(detector, int(served.latent_token_id))
        self.records: LatentRecords | None = None
        self._embeds: Tensor | None = None
        self._steps: LatentSteps | None = None

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """[N, H] hidden states; rows that a latent position follows hold FORCED."""
        assert input_ids is not None and inputs_embeds is None and intermediate_tensors is None
        step = Step.current(input_ids, positions)
        if step is None:
            return self._profile(input_ids, positions)
        return self._latent_steps(step).run(step, input_ids, fixed=self.options.fixed_decode)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[N, V + 1]; the last column is the latent id: certain where it is forced, impossible elsewhere."""
        forced_N = (hidden_states[:, 0] == FORCED) & (hidden_states[:, -1] == FORCED)
        logits_NV = super().compute_logits(hidden_states.masked_fill(forced_N[:, None], 0))
        if logits_NV is None:  # not this rank's task
            return None
        impossible = float("-inf")
        latent_N = torch.where(forced_N, 0.0, impossible).to(logits_NV.dtype)
        return torch.cat([logits_NV.masked_fill(forced_N[:, None], impossible), latent_N[:, None]], dim=1)

    def attach(self, runner: Any) -> None:
        """Check what is relied upon of vLLM's model runner and, where the engine was started so, begin to record."""
        check_runner(runner)
        if self.options.latents_folder is not None and get_tensor_model_parallel_rank() == 0:
            folder = Path(self.options.latents_folder)
            self.records = LatentRecords(runner, folder, self.automaton.latent_token_id)

    def _backbone(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Through a buffer of a fixed address: CUDA graphs of parts of the model read it, and layers add to it."""
        rows = embeds.shape[0]
        if self._embeds is None:
            most = max(rows, self.engine_config.scheduler_config.max_num_batched_tokens)
            self._embeds = embeds.new_zeros(most, embeds.shape[1])
        inputs = self._embeds[:rows]
        inputs.copy_(embeds)
        return super().forward(None, positions, None, inputs)

    def _profile(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """vLLM measures memory: everything that lasts is allocated, and the widest work done once."""
        self.automaton.place_on(positions.device)
        hidden = self._backbone(self.embed_input_ids(input_ids), positions)
        return hidden + 0 * self.reasoning_projector(hidden)

    def _latent_steps(self, step: Step) -> LatentSteps:
        """With side buffers for the KV cache there is now; vLLM also has a small one for measuring."""
        cache = self.engine_config.cache_config
        if self._steps is None or self._steps.buffers.blocks != cache.num_gpu_blocks:
            if step.ids_T.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("vLLM records a CUDA graph before any warm-up: set cudagraph_num_of_warmups to 1")
            like = torch.empty(0, dtype=self.engine_config.model_config.dtype, device=step.ids_T.device)
            buffers = SideBuffers(int(cache.num_gpu_blocks), int(cache.block_size), self.config.hidden_size, like)
            self.automaton.place_on(step.ids_T.device)
            self._steps = LatentSteps(
                self.automaton, self.embed_input_ids, self._backbone, self.reasoning_projector, buffers
            )
        self._steps.records = self.records
        return self._steps


class LiteReasonLlamaForCausalLM(LatentModel, LlamaForCausalLM):
    """Llama with latent steps."""


class LiteReasonMistralForCausalLM(LatentModel, MistralForCausalLM):
    """Mistral with latent steps."""


class LiteReasonQwen2ForCausalLM(LatentModel, Qwen2ForCausalLM):
    """Qwen 2 and 2.5 with latent steps."""


class LiteReasonQwen3ForCausalLM(LatentModel, Qwen3ForCausalLM):
    """Qwen 3 with latent steps."""
