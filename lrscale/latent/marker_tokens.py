"""Giving the two tags of the marker tokens of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrscale.latent.marker import CLOSE_TAG, OPEN_TAG


@torch.no_grad()
def ensure_marker_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add each tag that the tokenizer lacks as a special token and grow the embeddings where needed.

    A new row, of the input embedding and of the LM head, starts as the mean of the rows of the pieces that
    spelled the tag before, so that a model which could read the tag as text still recognises it.
    """
    vocabulary = tokenizer.get_vocab()
    pieces = {
        tag: tokenizer.encode(tag, add_special_tokens=False) for tag in (OPEN_TAG, CLOSE_TAG) if tag not in vocabulary
    }
    if not pieces:
        return
    tokenizer.add_tokens(list(pieces), special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for weight_VH in _distinct(model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        for tag, ids in pieces.items():
            weight_VH[tokenizer.convert_tokens_to_ids(tag)] = weight_VH[ids].mean(0)


def _distinct(first: Tensor, second: Tensor) -> list[Tensor]:
    """Both tensors, once where they are tied."""
    return [first] if first.data_ptr() == second.data_ptr() else [first, second]
