"""Makes the tiny base from nothing but a seed, and writes it where transformers can load it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lrscale.tasks.flawed_stories import FlawedStories
from lrscale.tasks.tiny_base.examples import Examples
from lrscale.tasks.tiny_base.measure import accuracy, completions, direct_accuracy
from lrscale.tasks.tiny_base.tokenizer import ring_task, save_tokenizer
from lrscale.tasks.tiny_base.training import TrainingSettings, build_model, train


def make_tiny_base(
    folder: Path, settings: TrainingSettings, *, eval_stories: int, report: Callable[[str], None]
) -> dict[str, float]:
    """Trains tokenizer and model, writes both into `folder`, and returns (and writes) what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    task = ring_task(settings.seed)
    tokenizer = save_tokenizer(folder, task)
    model = build_model(tokenizer, seed=settings.seed)
    report(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    examples = Examples(
        task, tokenizer, soft_share=settings.soft_share, slip_share=settings.slip_share, seed=settings.seed
    )
    started_s = time.process_time()
    mean_loss, tokens = 0.0, 0
    for step in train(model, examples, settings):
        mean_loss = step.loss if step.step == 1 else 0.95 * mean_loss + 0.05 * step.loss
        tokens = step.tokens_total
        if step.step % 50 == 0:
            report(
                f"step {step.step:5d} of {settings.steps}  loss {mean_loss:.4f}  {tokens / 1e6:.2f} M tokens  "
                f"{time.process_time() - started_s:.0f} CPU-s"
            )
    figures = {"tokens": tokens, **measured(model, tokenizer, task, eval_stories)}
    model.save_pretrained(folder)
    text = json.dumps({"settings": asdict(settings), "measured": figures}, indent=2)
    (folder / "made.json").write_text(f"{text}\n")
    return figures


def measured(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: FlawedStories, count: int
) -> dict[str, float]:
    """Accuracy on `count` eval stories (temperature 1): explicit, with markers as text, and without reasoning."""
    plain = [task.prompt("eval", index, markers=False) for index in range(count)]
    told = [task.prompt("eval", index, markers=True) for index in range(count)]
    told_texts = completions(model, tokenizer, told)
    return {
        "eval_stories": count,
        "accuracy_explicit": round(accuracy(task, plain, completions(model, tokenizer, plain)), 4),
        "accuracy_explicit_greedy": round(
            accuracy(task, plain, completions(model, tokenizer, plain, temperature=0.0)), 4
        ),
        "accuracy_direct": round(direct_accuracy(model, tokenizer, plain), 4),
        "accuracy_markers_without_latents": round(accuracy(task, told, told_texts), 4),
        "markers_mean": round(sum(text.count("<implicit_thought>") for text in told_texts) / count, 3),
    }
