"""What callers say about decoding, and how many rows are decoded side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Required, TypedDict

from lrscale.latent.decode import DecodeOptions
from lrscale.latent.expand import LatentMode
from lrscale.latent.sampling import SamplingOptions


class Generation(TypedDict, total=False):
    """Options of `generate` and `iter_generate`; only `max_new_tokens` is required."""

    max_new_tokens: Required[int]
    """Positions a completion may take: discrete tokens plus latent steps."""
    min_new_tokens: int
    """No stop token is drawn before so many positions; 0 by default."""
    temperature: float
    """1 by default; 0 takes the most likely token."""
    top_p: float
    top_k: int
    """0, the default, keeps the whole vocabulary."""
    seed: int
    row_keys: Sequence[int] | None
    """One integer a prompt, naming its random stream; its index where None. A row's draws depend on the
    seed and its key alone, not on what else is in the batch."""
    stop_ids: Sequence[int] | None
    """The model's own where None."""
    mode: LatentMode
    """`real` by default."""
    policy_version: int
    """Written into the rollouts."""
    batch_rows: int
    """Sequences decoded side by side; 256 by default. One more where a shuffled row would be left alone."""


def decode_options(options: Generation, stop_ids: tuple[int, ...]) -> DecodeOptions:
    """Checked and completed; ValueError for an option that there is not, or none for the length."""
    unknown = sorted(set(options) - set(Generation.__annotations__))
    if unknown:
        raise ValueError(f"generate has no option {unknown[0]!r}; it has {', '.join(Generation.__annotations__)}")
    if "max_new_tokens" not in options:
        raise ValueError("generate needs max_new_tokens: the most positions a completion may take")
    given = options.get("stop_ids")
    sampling = {name: options[name] for name in ("temperature", "top_p", "top_k") if name in options}
    passed = {name: options[name] for name in ("min_new_tokens", "seed", "mode", "policy_version") if name in options}
    return DecodeOptions(
        max_new_tokens=options["max_new_tokens"],
        stop_ids=stop_ids if given is None else tuple(given),
        sampling=SamplingOptions(**sampling),
        **passed,
    )


def even_batches(rows: int, batch_rows: int, *, least: int) -> list[slice]:
    """As few batches of about `batch_rows` as there must be, nearly equal, none below `least` rows where that can be."""
    count = min(-(-rows // batch_rows), max(1, rows // least))
    cuts = [rows * index // count for index in range(count + 1)] if rows else [0]
    return [slice(start, stop) for start, stop in pairwise(cuts)]
