"""What a tiny base can do: accuracy of sampled answers, explicit, with markers, and without any reasoning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lrscale.records import Prompt
from lrscale.tasks.flawed_stories import FlawedStories

_MAX_NEW_TOKENS = 128
_ROWS = 256


@torch.no_grad()
def completions(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """One completion a prompt, special tokens kept; markers are text here, no latent steps are taken."""
    model.eval()
    texts: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), _ROWS):
            rows = [prompt.text for prompt in prompts[start : start + _ROWS]]
            batch = tokenizer(rows, return_tensors="pt", padding=True)
            output_BT = model.generate(
                **batch,
                max_new_tokens=_MAX_NEW_TOKENS,
                do_sample=temperature > 0,
                temperature=temperature if temperature > 0 else None,
                top_k=0 if temperature > 0 else None,
            )
            texts += tokenizer.batch_decode(output_BT[:, batch["input_ids"].shape[1] :])
    return [text.replace(tokenizer.pad_token, "") for text in texts]


def accuracy(task: FlawedStories, prompts: Sequence[Prompt], texts: Sequence[str]) -> float:
    """Share of prompts whose completion gives the right boxed answer."""
    return sum(task.score(prompt, text).value for prompt, text in zip(prompts, texts, strict=True)) / len(prompts)


@torch.no_grad()
def direct_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> float:
    r"""Accuracy when the answer must follow the prompt at once: Yes or No, whichever is likelier after `\boxed{`."""
    model.eval()
    batch = tokenizer([f"{prompt.text} \\boxed{{" for prompt in prompts], return_tensors="pt", padding=True)
    logits_BV = model(**batch).logits[:, -1]
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    said_yes_B = logits_BV[:, yes] > logits_BV[:, no]
    true_B = torch.tensor([prompt.columns["answer"] == "Yes" for prompt in prompts])
    return (said_yes_B == true_B).float().mean().item()
