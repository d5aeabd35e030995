"""What the latent core needs of a transformers causal LM, and nothing else of it.

Legend: B rows, K positions fed now, S positions in the cache (K included), H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

AttentionMask = Tensor | dict[str, Tensor]

_UNKNOWN_LOGIT_SCALES = ("logit_scale", "logits_scaling")
_SCALE_SAMPLE = 4096


class Backbone:
    """Embedding, decoder stack (through the final norm) and LM head of an AutoModelForCausalLM.

    Not a module: it owns no parameters, it only knows where the model keeps them.

    Raises:
        ValueError: the model's head scales logits in a way that is not known here, or its attention takes no masks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        for name in _UNKNOWN_LOGIT_SCALES:
            if getattr(self.config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"{type(model).__name__} scales its logits by config.{name}, which lrscale does not apply; "
                    "use a Llama, Qwen, Mistral, Gemma or GPT-2 style model"
                )
        attention = self.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"attention: given {attention!r}, allowed sdpa or eager: expand and generate hand masks of their own "
                "to the model, which other kernels do not take"
            )
        self._softcap = getattr(self.config, "final_logit_softcapping", None)
        self._sliding = _sliding_layers(self.config)

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def vocabulary(self) -> int:
        """Rows of the LM head. Asked of the module: a sharded weight's shape tells nothing."""
        return int(self.model.get_output_embeddings().out_features)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def checkpoints_layers(self) -> bool:
        """Whether transformers' gradient checkpointing is switched on."""
        return bool(self.model.is_gradient_checkpointing)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[...] ids to [..., H] input embeddings."""
        return self.model.get_input_embeddings()(input_ids)

    def head(self, hidden: Tensor) -> Tensor:
        """[..., H] final-norm hidden states to [..., V] logits."""
        logits = self.model.get_output_embeddings()(hidden)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def forward_causal(self, embeds_BSH: Tensor) -> Tensor:
        """One causal forward over right-padded rows; hidden states [B, S, H] after the final norm.

        No mask is passed: behind a row's end nothing that is read looks, and without one
        the fused causal kernels are used. Layers are checkpointed where the model asks for it.
        """
        checkpointed = self.checkpoints_layers and torch.is_grad_enabled()
        with _training_mode(self.model, on=checkpointed):
            return self.model.base_model(inputs_embeds=embeds_BSH, use_cache=False).last_hidden_state

    def forward_cached(
        self, embeds_BKH: Tensor, mask: AttentionMask | None, positions_BK: Tensor, cache: Cache
    ) -> Tensor:
        """Forward of K new positions behind those in the cache; hidden states [B, K, H] after the final norm.

        Without a mask it is causal over an empty cache. Layers are checkpointed where the model asks for it; the
        cache must be one that a layer may update twice (PieceLayer).
        """
        checkpointed = self.checkpoints_layers and torch.is_grad_enabled()
        # transformers drops the cache of a checkpointed training forward, so its own way is switched off.
        with _training_mode(self.model, on=False), _checkpointed(self._blocks() if checkpointed else ()):
            return self.model.base_model(
                inputs_embeds=embeds_BKH,
                attention_mask=mask,
                position_ids=positions_BK,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state

    def attention_mask(self, query_position_BK: Tensor, key_position_BS: Tensor, key_valid_BS: Tensor) -> AttentionMask:
        """Who looks at whom: real keys at the query's own position or before, within the window of sliding layers.

        Positions, not cache slots, decide: rows of different lengths leave holes in the cache.
        The result is [B, 1, K, S], or one such mask a layer type as transformers takes them.
        """
        query_BK1, key_B1S = query_position_BK[:, :, None], key_position_BS[:, None, :]
        full_B1KS = ((key_B1S <= query_BK1) & key_valid_BS[:, None, :])[:, None]
        if not self._sliding:
            return self._native(full_B1KS)
        near_BKS = key_B1S > query_BK1 - self.config.sliding_window
        sliding_B1KS = self._native(full_B1KS & near_BKS[:, None])
        if self._sliding == "all":
            return sliding_B1KS
        return {"full_attention": self._native(full_B1KS), "sliding_attention": sliding_B1KS}

    def _native(self, allowed_B1KS: Tensor) -> Tensor:
        """What attention adds to its scores: made of booleans once here, and not by each layer again."""
        zeros = torch.zeros(allowed_B1KS.shape, dtype=self.dtype, device=allowed_B1KS.device)
        return zeros.masked_fill(~allowed_B1KS, torch.finfo(self.dtype).min)

    def check_positions(self, positions: int) -> None:
        """Raises ValueError where a sequence takes more positions than the model was built for."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and positions > limit:
            raise ValueError(
                f"a sequence takes {positions} positions (tokens and latent steps), the model has {limit}; "
                "shorten the prompts or lower rollout.max_new_tokens"
            )

    def embedding_rms(self) -> float:
        """Root mean square of the input embeddings, over at most 4,096 tokens spread over the vocabulary."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.linspace(0, vocabulary - 1, min(vocabulary, _SCALE_SAMPLE), device=self.device).long()
        with torch.no_grad():
            return self.embed(ids).float().pow(2).mean().sqrt().item()

    def last_mlp(self) -> nn.Module:
        """The MLP of the last transformer block, which the projector is cloned from.

        Raises:
            ValueError: no gated or plain MLP from width H to width H is there (mixtures of experts, exotic blocks).
        """
        blocks = self._blocks()
        mlp = getattr(blocks[-1], "mlp", None) if len(blocks) else None
        if not isinstance(mlp, nn.Module):
            raise ValueError(
                f"{type(self.model).__name__} has no `mlp` in its last block, so there is nothing to clone the "
                "Reasoning Projector from; use a model with plain or gated MLPs (Llama, Qwen, Mistral, Gemma, GPT-2)"
            )
        if hasattr(mlp, "experts"):
            raise ValueError(
                f"the last MLP of {type(self.model).__name__} is a mixture of experts, which the Reasoning Projector "
                "cannot be cloned from; use a dense model (Llama, Qwen, Mistral, Gemma, GPT-2)"
            )
        return mlp

    def _blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks; none where the model calls them by another name."""
        inner = self.model.base_model
        return getattr(inner, "layers", None) or getattr(inner, "h", None) or ()


def _sliding_layers(config: object) -> str:
    """`` (none), `all` or `some` layers attend within a window (Mistral, Gemma 2 and 3, Qwen with the option on)."""
    if not getattr(config, "sliding_window", None):
        return ""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return "all"
    sliding = [kind == "sliding_attention" for kind in kinds]
    return "some" if any(sliding) else ""


@contextmanager
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Each block's forward keeps its inputs only and runs again in the backward pass."""
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, determinism_check="none")
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:  # somebody else's, as accelerate's hooks set it
                block.forward = forward


@contextmanager
def _training_mode(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Dropout is off in every policy, so that the flag decides about layer checkpointing alone."""
    before = model.training
    if before != on:
        model.train(on)
    try:
        yield
    finally:
        if before != on:
            model.train(before)


def disable_dropout(model: nn.Module) -> None:
    """Make training and evaluation forwards the same function: log-prob ratios need it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
