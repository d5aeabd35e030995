"""The tokenizer: what pads, what stops, and whether a marker written by the model is found again."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lrscale.config.diagnosis import Check
from lrscale.config.recipe import Recipe
from lrscale.latent import MarkerDetector
from lrscale.latent.marker import CLOSE_TAG, OPEN_TAG

_SOUNDINGS = ("{}", "So {} then", "({})", "\n\n{}\n", "{}{}")
"""Places in a text where a marker may stand; tokens run across its ends."""


def check_tokenizer(recipe: Recipe, source: str) -> list[Check]:
    """Pad, eos, chat template and markers of the recipe's tokenizer, by encoding and finding them."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        found = f"{recipe.model.path}: {str(error).splitlines()[0]}"
        help_ = "save the model's tokenizer beside it: tokenizer.save_pretrained(folder)"
        return [Check("tokenizer", "failed", found, needed="a tokenizer that transformers loads", help=help_)]
    return [_pad_and_eos(tokenizer, recipe), check_markers(tokenizer, recipe.projector.max_latent_steps)]


def _pad_and_eos(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Check:
    pad, eos = tokenizer.pad_token, tokenizer.eos_token
    if eos is None:
        found = f"no eos token, pad is {pad!r}"
        help_ = "set tokenizer.eos_token and save it beside the model (tokenizer.save_pretrained)"
        return Check("tokenizer", "failed", found, needed="an eos token: without it no completion ends", help=help_)
    if recipe.model.chat_template and not tokenizer.chat_template:
        help_ = "set model.chat_template: false, or take a model with a template"
        found = "model.chat_template is true, but the tokenizer has none"
        return Check("tokenizer", "failed", found, needed="a chat template", help=help_)
    padding = f"pad {pad!r}" if pad is not None else "no pad token (eos pads; masks tell what is padding)"
    return Check("tokenizer", "ok", f"eos {eos!r}, {padding}, {len(tokenizer)} tokens")


def check_markers(tokenizer: PreTrainedTokenizerBase, most: int) -> Check:
    """Markers of every number up to `most`, found with the right number in several surroundings."""
    help_ = "set model.add_marker_tokens: true once and train from the saved model, or take a byte-level tokenizer"
    needed = f"{OPEN_TAG}N{CLOSE_TAG} written and found for N from 1 to {most}"
    try:
        detector = MarkerDetector(tokenizer, most)
        lost = [text for n in range(1, most + 1) for text in _lost(tokenizer, detector, n)]
        pieces = len(detector.marker_ids(1))
    except ValueError as error:
        return Check("markers", "failed", str(error), needed=needed, help=help_)
    if lost:
        found = f"{len(lost)} texts whose markers are not found, {lost[0]!r} first"
        return Check("markers", "failed", found, needed=needed, help=help_)
    return Check(
        "markers", "ok", f"1 to {most} found in {len(_SOUNDINGS)} surroundings each, {pieces} tokens for N = 1"
    )


def _lost(tokenizer: PreTrainedTokenizerBase, detector: MarkerDetector, n: int) -> list[str]:
    marker = f"{OPEN_TAG}{n}{CLOSE_TAG}"
    texts = [sounding.replace("{}", marker) for sounding in _SOUNDINGS]
    return [
        text
        for text in texts
        if [span.steps for span in detector.find(tokenizer.encode(text))] != [n] * text.count(marker)
    ]
