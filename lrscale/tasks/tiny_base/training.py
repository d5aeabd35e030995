"""Building and training the tiny base: a Llama of under a million parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lrscale.tasks.tiny_base.examples import Batch, Examples
from lrscale.tasks.tiny_base.muon import Muon


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What decides the weights, besides the task's stories."""

    seed: int = 0
    steps: int = 1500
    rows: int = 24
    slip_share: float = 0.08
    """How careless the writer of the traces is, see `careless_notes`."""
    soft_share: float = 0.6
    """Share of examples with markers and soft inputs; the rest are explicit traces."""
    muon_learning_rate: float = 0.02
    """For the matrices of the transformer blocks."""
    adamw_learning_rate: float = 3e-3
    """For embeddings, LM head and norms."""
    weight_decay: float = 0.05
    warmup_steps: int = 50
    decay_from: float = 0.25
    """Share of the steps after which the learning rate falls, linearly, to a twentieth."""
    max_grad_norm: float = 1.0

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0, as a share of its peak."""
        start = self.decay_from * self.steps
        decay = 1.0 - 0.95 * max(0.0, step - start) / (self.steps - start)
        return min(1.0, (step + 1) / self.warmup_steps) * decay


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One line of progress. `step` counts from 1."""

    step: int
    loss: float
    tokens_total: int


def build_model(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> LlamaForCausalLM:
    """A fresh model: width 128, 4 blocks, 4 heads, float32, weights drawn from `seed`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, examples: Examples, settings: TrainingSettings) -> Iterator[TrainingStep]:
    """Trains for `settings.steps` steps, yielding after each of them."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    decay = settings.weight_decay
    optimizers = [
        Muon(matrices, lr=settings.muon_learning_rate, weight_decay=decay),
        torch.optim.AdamW(others, lr=settings.adamw_learning_rate, betas=(0.9, 0.98), weight_decay=decay),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, settings.learning_rate_at) for optimizer in optimizers]
    tokens_total = 0
    for step, batch in zip(range(1, settings.steps + 1), examples.batches(settings.rows), strict=False):
        model.train()
        loss = batch_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        tokens_total += batch.tokens
        yield TrainingStep(step, loss.item(), tokens_total)


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy of the learned tokens, plus that of the bags (summed, over the same count)."""
    hidden_BTH = model.model(inputs_embeds=input_embeddings(model, batch), use_cache=False).last_hidden_state
    learned_BT = batch.learned_BT[:, 1:]
    logits_NV = model.lm_head(hidden_BTH[:, :-1][learned_BT]).float()
    loss = F.cross_entropy(logits_NV, batch.ids_BT[:, 1:][learned_BT])
    if batch.bag_index_2M.numel():
        rows, positions = batch.bag_index_2M
        bag_logits_MV = model.lm_head(hidden_BTH[rows, positions]).float()
        loss = loss + F.cross_entropy(bag_logits_MV, batch.bag_targets_MV, reduction="sum") / len(logits_NV)
    return loss


def input_embeddings(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """[B, T, H]: token embeddings, with the soft inputs in their places."""
    weight_VH = model.get_input_embeddings().weight
    embeddings_BTH = F.embedding(batch.ids_BT, weight_VH)
    if not batch.soft_index_2N.numel():
        return embeddings_BTH
    soft_NH = batch.soft_weights_NV @ weight_VH
    return embeddings_BTH.index_put(tuple(batch.soft_index_2N), soft_NH.to(embeddings_BTH.dtype))
