"""Rows to micro-batches."""

from __future__ import annotations

import random
from itertools import chain

import torch

from lrscale.stages.batching import micro_batches, padded


def test_every_row_once_within_the_budget():
    """A row left out would be left out of the loss, one too many runs out of memory."""
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 50) for _ in range(rng.randint(1, 40))]
        batches = micro_batches(lengths, 120)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 120


def test_a_row_longer_than_the_budget_goes_alone():
    assert micro_batches([500, 10, 10], 100) == [[0], [1, 2]]


def test_least_rows():
    """Shuffling latents needs two rows side by side."""
    assert all(len(batch) >= 2 for batch in micro_batches([90, 80, 70, 60, 50], 100, least_rows=2))
    assert micro_batches([90], 100, least_rows=2) == [[0]]


def test_no_rows():
    assert micro_batches([], 100) == []


def test_padding_is_masked_by_length_not_by_id():
    """Pad may equal eos: a row that holds id 0 keeps it."""
    ids_BT, mask_BT = padded([(0, 5, 0), (7,)], torch.device("cpu"))
    assert ids_BT.tolist() == [[0, 5, 0], [7, 0, 0]]
    assert mask_BT.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_rows_of_a_prompt_stand_together_and_pay_for_it_once() -> None:
    """Locks out a prompt that is run for each of its samples, and a batch that looks at more than memory holds."""
    prefixes = [(1,) * 50] * 4 + [(2,) * 50] * 4
    lengths = [10, 9, 8, 7, 10, 9, 8, 7]
    assert micro_batches(lengths, 90, prefixes=prefixes) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert micro_batches(lengths, 180, prefixes=prefixes) == [[0, 4, 1, 5, 2, 6, 3, 7]]
    crowded = micro_batches([1] * 100, 100, prefixes=[(1,) * 39] * 100)
    assert max(map(len, crowded)) == 10, "10 rows x 40 positions seen are four budgets"
    assert sorted(chain.from_iterable(crowded)) == list(range(100))


def test_rows_whose_lengths_differ_more_than_their_prompts_are_long_stand_by_length() -> None:
    assert micro_batches([90, 1, 90, 1], 200, prefixes=[(1,), (1,), (2,), (2,)]) == [[0, 2], [1, 3]]
