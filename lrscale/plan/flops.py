"""Floating point operations of forwards and updates, a multiplication and an addition counted as two.

The convention of PaLM (arXiv 2204.02311, appendix B) and of torch's FlopCounterMode: matrix products and attention
count, norms and softmax do not; attention is counted over all pairs of positions, whether causal kernels skip half
of them or not.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrscale.plan.model_dims import ModelDims


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one sequence."""

    layers: float
    """Matrix products of all layers, forward."""
    attention: float
    """Scores and weighted sums of all layers, forward."""
    last_products: float
    """Of `layers`: the product that ends each layer's MLP, which early stopping spares a recomputed layer."""
    head: float
    """The LM head, forward, over the positions that are scored."""

    @property
    def forward(self) -> float:
        return self.layers + self.attention + self.head

    def training(self, *, checkpointing: bool) -> float:
        """Forward and backward, the recomputation included.

        The backward pass takes twice the forward's products: one for the input, one for the weight (arXiv
        2204.02311, appendix B). The head runs in checkpointed chunks (`LatentPolicy.token_logprobs`), so it is always
        computed once more. With `checkpointing` so are the layers, but for each one's last product: torch's
        non-reentrant checkpoints stop when the last saved tensor is back.
        """
        recomputed = self.layers + self.attention - self.last_products if checkpointing else 0.0
        return 3 * (self.layers + self.attention) + 4 * self.head + recomputed

    def projector_training(self, *, checkpointing: bool) -> float:
        """The base's part in projector SFT: frozen, so its backward pass takes no products for weights."""
        recomputed = self.layers + self.attention - self.last_products if checkpointing else 0.0
        attention = 3 * self.attention  # its backward has no weights to leave out
        return 2 * self.layers + attention + 3 * self.head + recomputed


def flops(dims: ModelDims, positions: int, *, scored: int | None = None, causal: bool = False) -> Flops:
    """Of one sequence of `positions`, tokens and latents alike.

    Args:
        dims: The model; of a mixture of experts the active ones count.
        positions: Positions of the sequence.
        scored: Positions whose log-probs are taken; None: all.
        causal: Count half of the attention, as kernels that skip what is masked compute it (FlashAttention,
            arXiv 2205.14135); FlopCounterMode counts all of it.
    """
    matrices = sum(
        count * (dims.attention_matrices + dims.mlp_matrices(layer, active=True)) for layer, count in dims.layer_kinds
    )
    width = dims.heads * dims.head_dim
    pairs = positions * positions * (0.5 if causal else 1.0)
    return Flops(
        layers=2.0 * matrices * positions,
        attention=4.0 * dims.layers * width * pairs,
        last_products=2.0 * sum(count * _down(dims, layer) for layer, count in dims.layer_kinds) * positions,
        head=2.0 * dims.vocabulary * dims.hidden * (positions if scored is None else scored),
    )


def projector_flops(dims: ModelDims, layers: int, latents: float) -> float:
    """Of the Reasoning Projector over so many latent positions, forward."""
    return 2.0 * dims.projector_parameters(layers) * latents


def _down(dims: ModelDims, layer: int) -> int:
    """Elements of the last product of a layer: nothing is spared where its input is weighted afterwards (experts)."""
    experts = dims.experts
    if experts is not None and layer not in experts.dense_layers:
        return 0
    return dims.hidden * dims.intermediate
