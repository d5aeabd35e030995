"""The plainest possible latent reasoning: one sequence, no cache, one whole forward a latent. The oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from lrscale.latent import LatentPolicy


def plain_expand(policy: LatentPolicy, ids: list[int], latents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits [T, V] aligned with tokens, and latents [L, H].

    With `latents` given they are put in, as many as there are, and what comes back is what the projector
    makes at each of their positions: long chains amplify rounding, one step at a time does not.
    """
    base, head = policy.model.base_model, policy.model.get_output_embeddings()
    embed = policy.model.get_input_embeddings()
    steps_at = {span.position: span.steps for span in policy.detector.find(ids)}
    embeds: list[Tensor] = []
    kept: list[int] = []
    made: list[Tensor] = []
    sources: list[int] = []
    for position, token in enumerate(ids):
        embeds.append(embed(torch.tensor(token)))
        for _ in range(steps_at.get(position, 0)):
            if latents is None:
                hidden = base(inputs_embeds=torch.stack(embeds)[None], use_cache=False).last_hidden_state
                latent = policy.projector(hidden[0, -1])
            elif len(made) < len(latents):
                latent = latents[len(made)]
                sources.append(len(embeds) - 1)
            else:
                break
            embeds.append(latent)
            made.append(latent)
        kept.append(len(embeds) - 1)
    hidden = base(inputs_embeds=torch.stack(embeds)[None], use_cache=False).last_hidden_state[0]
    if latents is not None:
        made = [policy.projector(hidden[source]) for source in sources]
    empty = hidden.new_zeros(0, hidden.shape[-1])
    return head(hidden[kept]), torch.stack(made) if made else empty


def plain_logprobs(logits_TV: Tensor, ids: list[int], temperature: float = 1.0) -> Tensor:
    """[T] log p(token t | before t), 0 at t = 0."""
    logprobs = torch.log_softmax(logits_TV / temperature, -1)
    picked = [logprobs[t - 1, ids[t]] for t in range(1, len(ids))]
    return torch.stack([logits_TV.new_zeros(()), *picked])
