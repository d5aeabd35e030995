"""Random choices as functions of names and counters, so that a resumed run needs no generator's state.

No stream of sampling or of RL is named after an arm: every arm meets the same prompts in the same order and
draws from the same streams, which makes the arms' differences their own. Only the order of a refresh's rows is
drawn from a stream with the arm's name (projector_sft), and those rows are the arm's own anyway.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def stream_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) for the stream called `names`, e.g. stream_seed(recipe.seed, "rl", step)."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> random.Random:
    """A generator of its own for one purpose."""
    return random.Random(stream_seed(seed, *names))


def shuffled(items: Sequence[Item], seed: int, *names: str | int) -> list[Item]:
    """The items in the order that the stream draws."""
    order = list(items)
    generator(seed, *names).shuffle(order)
    return order


def take_cyclic(items: Sequence[Item], start: int, count: int, seed: int, *names: str | int) -> list[Item]:
    """Items `start` to `start + count` of an endless sequence of epochs, each a fresh permutation of `items`."""
    taken: list[Item] = []
    while len(taken) < count:
        epoch, offset = divmod(start + len(taken), len(items))
        order = shuffled(items, seed, *names, epoch)
        taken.extend(order[offset : offset + count - len(taken)])
    return taken
