"""Tiny random models of several architectures, with projectors that are alive."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lrscale.latent import LatentPolicy

TAGS = ["<implicit_thought>", "</implicit_thought>"]
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
ARCHITECTURES = ("llama", "qwen3", "gemma", "gpt2")


def tiny_tokenizer(*, tags: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level, one token a byte, the two tags as special tokens: 256 + 4 ids (256 + 2 without tags)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    if tags:
        tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
    return tokenizer


def tiny_model(architecture: str, vocabulary: int, dtype: torch.dtype = torch.float64, **overrides):
    torch.manual_seed(0)
    ids = {"vocab_size": vocabulary, "pad_token_id": None, "bos_token_id": None, "eos_token_id": vocabulary - 3}
    if architecture == "llama":
        config = LlamaConfig(**COMMON, **ids, **overrides)
    elif architecture == "mistral":
        config = MistralConfig(**COMMON, **ids, **overrides)
    elif architecture == "qwen3":
        config = Qwen3Config(**COMMON, **ids, head_dim=8, **overrides)
    elif architecture == "gemma":
        config = GemmaConfig(**COMMON, **ids, head_dim=8, **overrides)
    elif architecture == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.1, resid_pdrop=0.1, **ids, **overrides
        )
    else:
        raise ValueError(architecture)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    if dtype == torch.float64:
        widen_norms(model)
    return model


def live_policy(
    architecture: str = "llama", dtype: torch.dtype = torch.float64, projector_kind: str = "paper", **overrides
) -> LatentPolicy:
    """A policy whose latents have the norm of embeddings: a dead projector passes every test."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(architecture, len(tokenizer), dtype, **overrides)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    policy = LatentPolicy.from_pretrained(model, tokenizer, 3, 32, projector_kind=projector_kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.projector.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(dtype) * parameter.std() if parameter.numel() > 1 else 0)
        if projector_kind == "paper":
            _calibrate(policy)
    return policy


def _calibrate(policy: LatentPolicy) -> None:
    """Rescale the last block until latents in the middle of a chain have the scale of embeddings."""
    last = policy.projector[-1]
    weight = (last.c_proj if hasattr(last, "c_proj") else last.down_proj).weight
    ids, mask = padded(random_rows(policy, [[(5, 4)], [(9, 4)]], 12), "right")
    for _ in range(12):
        weight.mul_(policy.scale_ratio(policy.expand(ids, mask).latents) ** -0.5)


class WideRMSNorm(torch.nn.Module):
    """transformers' RMS norms compute in float32 even in a float64 model, which hides differences below 1e-7."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
        return hidden * scale * (self.weight + self.offset)


def widen_norms(model: torch.nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, WideRMSNorm(child))


def random_rows(
    policy: LatentPolicy, spans: list[list[tuple[int, int]]], tokens: int, seed: int = 0
) -> list[list[int]]:
    """Rows of random letters with markers written at the given (token index, number)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, row in enumerate(spans):
        length = tokens - 3 * (number % 3)
        ids = torch.randint(60, 90, (length,), generator=generator).tolist()
        for position, steps in row:
            ids[position:position] = policy.marker_ids(steps)
        rows.append(ids)
    return rows


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding holds a real letter, so that anything that looks at ids instead of the mask fails."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 70)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, values in enumerate(rows):
        columns = slice(0, len(values)) if side == "right" else slice(width - len(values), width)
        ids[row, columns] = torch.tensor(values)
        mask[row, columns] = 1
    return ids, mask
