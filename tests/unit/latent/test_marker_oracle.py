"""Random ids and random texts against a slow, obvious reading of the definition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrscale.latent.marker import CLOSE_TAG, OPEN_TAG, MarkerDetector
from lrscale.records import LatentSpan
from tests.unit.latent.trained_tokenizers import NAMES, tokenizer_named, tokenizer_of

torch.set_num_threads(1)

MARKER = re.compile(rb"<implicit_thought> *([0-9]+) *</implicit_thought>")
FRAGMENTS = [
    *(OPEN_TAG, CLOSE_TAG, OPEN_TAG[:7], OPEN_TAG[7:], CLOSE_TAG[:7], CLOSE_TAG[7:], OPEN_TAG[1:], CLOSE_TAG[1:]),
    *(CLOSE_TAG[:-1], "</", "<", ">", "><", "/", " ", "  ", "<i"),
    *("0", "1", "3", "12", "007", "250", "a", ".", "\n", "ö"),
    *(f"{OPEN_TAG}4", f"5{CLOSE_TAG}", f"{OPEN_TAG}6{CLOSE_TAG}", f"{OPEN_TAG}0{CLOSE_TAG}", f">{OPEN_TAG}"),
    *(f"{OPEN_TAG}6{CLOSE_TAG}{OPEN_TAG}", f"7{CLOSE_TAG}{OPEN_TAG}8{CLOSE_TAG}", f"{OPEN_TAG}6{CLOSE_TAG}."),
]
SLOW = settings(max_examples=60, deadline=None, derandomize=True)


def oracle(detector: MarkerDetector, ids: Sequence[int]) -> list[LatentSpan]:
    """Join the bytes between barriers, search them with the regex, map the ends back to tokens."""
    steps_at: dict[int, int] = {}
    barriers = [-1, *(i for i, token in enumerate(ids) if detector.is_opaque(token)), len(ids)]
    for left, right in pairwise(barriers):
        pieces = [detector.token_bytes(token) for token in ids[left + 1 : right]]
        ends = list(accumulate(map(len, pieces)))
        for match in MARKER.finditer(b"".join(pieces)):
            if number := int(match[1]):
                token = next(i for i, end in enumerate(ends) if end >= match.end())
                steps_at[left + 1 + token] = min(number, detector.max_latent_steps)
    return [LatentSpan(position, steps) for position, steps in sorted(steps_at.items())]


@cache
def detector_named(name: str, max_latent_steps: int = 32) -> MarkerDetector:
    if name == "fragments":
        return MarkerDetector(tokenizer_of([fragment.encode() for fragment in FRAGMENTS]), max_latent_steps)
    return MarkerDetector(tokenizer_named(name), max_latent_steps)


def by_advance_one(detector: MarkerDetector, ids: Sequence[int]) -> list[LatentSpan]:
    state, spans = detector.initial_state, []
    for position, token in enumerate(ids):
        state, steps = detector.advance_one(state, token)
        if steps:
            spans.append(LatentSpan(position, steps))
    return spans


def by_advance(detector: MarkerDetector, rows: Sequence[Sequence[int]]) -> list[list[LatentSpan]]:
    """All rows at once, those that have ended go on with an ordinary token."""
    states_B = torch.full((len(rows),), detector.initial_state)
    spans: list[list[LatentSpan]] = [[] for _ in rows]
    for position in range(max(map(len, rows), default=0)):
        tokens = [row[position] if position < len(row) else 0 for row in rows]
        states_B, steps_B = detector.advance(states_B, torch.tensor(tokens))
        for row, steps in enumerate(steps_B.tolist()):
            if steps and position < len(rows[row]):
                spans[row].append(LatentSpan(position, steps))
    return spans


def padded(rows: Sequence[Sequence[int]], *, left: bool, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows), default=0) + 1
    ids_BT, mask_BT = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids_BT[b, place], mask_BT[b, place] = torch.tensor(row, dtype=torch.long), 1
    return ids_BT, mask_BT


def assert_all_ways_agree(detector: MarkerDetector, rows: Sequence[Sequence[int]]) -> None:
    expected = [oracle(detector, row) for row in rows]
    assert [detector.find(row) for row in rows] == expected
    assert [by_advance_one(detector, row) for row in rows] == expected
    assert by_advance(detector, rows) == expected
    pads = [0, detector.tokenizer.eos_token_id, *(row[0] for row in rows[:1] if row)]
    for pad in pads:  # padding may look like anything, the start of a marker included
        for left in (False, True):
            assert detector.find_batch(*padded(rows, left=left, pad=pad)) == expected


@st.composite
def id_rows(draw: st.DrawFn, name: str) -> list[list[int]]:
    """Up to four rows of ids: whole markers, tokens that can be part of one, any others, barriers."""
    detector = detector_named(name)
    vocabulary_size = len(detector.tokenizer)
    useful = [i for i in range(vocabulary_size) if re.search(rb"[<>/0-9 ]|implicit|thought", detector.token_bytes(i))]
    runs = [st.sampled_from(useful).map(lambda i: [i]), st.integers(-2, vocabulary_size + 3).map(lambda i: [i])]
    if name != "fragments":
        runs.append(st.integers(1, 40).map(lambda n: list(detector.marker_ids(n))))
        runs.append(st.text("</>0123 a", max_size=4).map(lambda t: encode(name, f"{OPEN_TAG}{t}{CLOSE_TAG}")))
    row = st.lists(st.one_of(runs), max_size=12).map(lambda parts: [i for part in parts for i in part])
    return draw(st.lists(row, max_size=4))


def encode(name: str, text: str) -> list[int]:
    return tokenizer_named(name).encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["fragments", *NAMES])
def test_random_ids_agree_with_the_oracle(name: str) -> None:
    """Locks out any difference between decoding, recorded sequences, padding sides and the regex."""

    @SLOW
    @given(id_rows(name))
    def check(rows: list[list[int]]) -> None:
        assert_all_ways_agree(detector_named(name), rows)

    check()


@settings(SLOW, max_examples=400)
@given(st.lists(st.integers(0, len(FRAGMENTS)), max_size=25), st.sampled_from([1, 6, 32, 256]))
def test_fragments_agree_with_the_oracle(ids: list[int], max_latent_steps: int) -> None:
    """Tokens that are pieces of tags, cut in all ways: most examples hold partial matches that fail."""
    detector = detector_named("fragments", max_latent_steps)
    expected = oracle(detector, ids)
    assert detector.find(ids) == by_advance_one(detector, ids) == expected


@pytest.mark.parametrize("name", NAMES)
def test_random_texts_agree_with_the_oracle(name: str) -> None:
    """The same from the side of text, as a prompt comes in."""
    words = st.one_of(
        st.sampled_from(FRAGMENTS),
        st.text("<>/ 01239abcimplt_hough.\n", max_size=3),
        st.integers(0, 300).map(lambda n: f"{OPEN_TAG}{n}{CLOSE_TAG}"),
    )

    @SLOW
    @given(st.lists(st.lists(words, max_size=8).map("".join), max_size=3))
    def check(texts: list[str]) -> None:
        detector = detector_named(name)
        rows = [encode(name, text) for text in texts]
        if name == "byte_level_bpe-plain":  # nothing is added or lost on the way, so the text itself is the measure
            for text, row in zip(texts, rows, strict=True):
                numbers = [int(match[1]) for match in MARKER.finditer(text.encode())]
                assert [span.steps for span in detector.find(row)] == [min(n, 32) for n in numbers if n]
        assert_all_ways_agree(detector, rows)

    check()
