"""Makes the tiny base from nothing but a seed, and writes it where transformers can load it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lrscale.tasks.flawed_stories import FlawedStories
from lrscale.tasks.tiny_base.examples import Examples
from lrscale.tasks.tiny_base.measure import accuracy, completions, direct_accuracy
from lrscale.tasks.tiny_base.tokenizer import ring_task, save_tokenizer
from lrscale.tasks.tiny_base.training import TrainingSettings, TrainingStep, build_model, train


@dataclass(frozen=True, slots=True)
class StopRule:
    """When training ends: at the first measurement that reaches `accuracy`, or after `max_steps`.

    The base shall reason better than chance and yet leave RL something to gain, so it is stopped
    on its way up. The stories it is measured on are train stories of another seed; eval stories
    play no part in the choice.
    """

    accuracy: float = 0.68
    prompts: int = 512
    first_step: int = 500
    every: int = 20
    max_steps: int = 1200


def make_tiny_base(
    folder: Path, settings: TrainingSettings, stop: StopRule, report: Callable[[str], None]
) -> dict[str, float]:
    """Trains tokenizer and model, writes both into `folder`, and returns (and writes) what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    task = ring_task(settings.seed)
    tokenizer = save_tokenizer(folder, task)
    model = build_model(tokenizer, seed=settings.seed)
    report(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    examples = Examples(task, tokenizer, soft_share=settings.soft_share, seed=settings.seed)
    choice_task = ring_task(settings.seed + 1)
    choice_prompts = [choice_task.prompt("train", index, markers=False) for index in range(stop.prompts)]
    started_s = time.process_time()
    mean_loss = 0.0
    for step in train(model, examples, settings):
        mean_loss = step.loss if step.step == 1 else 0.95 * mean_loss + 0.05 * step.loss
        if step.step % 50 == 0:
            report(_progress(step, mean_loss, time.process_time() - started_s))
        if step.step >= stop.max_steps:
            break
        if step.step >= stop.first_step and step.step % stop.every == 0:
            reached = accuracy(choice_task, choice_prompts, completions(model, tokenizer, choice_prompts))
            report(f"step {step.step:5d}  explicit accuracy {reached:.3f} on {stop.prompts} stories")
            if reached >= stop.accuracy:
                break
    figures = {"steps": step.step, "tokens": step.tokens_total, **measured(model, tokenizer, task, stop.prompts)}
    model.save_pretrained(folder)
    text = json.dumps({"settings": asdict(settings), "stop": asdict(stop), "measured": figures}, indent=2)
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
        "accuracy_direct": round(direct_accuracy(model, tokenizer, plain), 4),
        "accuracy_markers_without_latents": round(accuracy(task, told, told_texts), 4),
        "markers_mean": round(sum(text.count("<implicit_thought>") for text in told_texts) / count, 3),
    }


def _progress(step: TrainingStep, mean_loss: float, cpu_s: float) -> str:
    return f"step {step.step:5d}  loss {mean_loss:.4f}  {step.tokens_total / 1e6:.2f} M tokens  {cpu_s:.0f} CPU-s"
