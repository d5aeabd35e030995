"""Markers in written-down contexts, on trained tokenizers of every family."""

from __future__ import annotations

import copy
import pickle
import re
from functools import cache

import pytest
import torch

from lrscale.latent.marker import CLOSE_TAG, MAX_LATENT_STEPS_LIMIT, OPEN_TAG, MarkerDetector
from lrscale.records import LatentSpan
from tests.unit.latent.trained_tokenizers import NAMES, tokenizer_named, tokenizer_of

torch.set_num_threads(1)

TAGGED = [name for name in NAMES if name.endswith("-tags")]
CHARACTERS = [bytes([byte]) for byte in range(256)]


def m(number: object) -> str:
    return f"{OPEN_TAG}{number}{CLOSE_TAG}"


CONTEXTS = {
    "alone": (m(3), [3]),
    "at the start": (m(3) + " the cat", [3]),
    "at the end": ("the cat." + m(3), [3]),
    "between spaces": ("the cat " + m(3) + " was in", [3]),
    "behind a full stop": ("the cat." + m(3), [3]),
    "behind a newline": ("the cat\n" + m(3), [3]),
    "before a newline": (m(3) + "\nthe cat", [3]),
    "before <": (m(3) + "<the", [3]),
    "behind <": ("a<" + m(3), [3]),
    "behind >": ("a>" + m(3) + ">", [3]),
    "in parentheses": ("(" + m(3) + ")", [3]),
    "beside a letter that is not ASCII": ("ö" + m(3) + "ß", [3]),
    "beside digits": ("4" + m(3) + "5", [3]),
    "two adjacent": (m(3) + m(5), [3, 5]),
    "three adjacent": (m(1) + m(2) + m(3), [1, 2, 3]),
    "two apart": (m(4) + " the cat. " + m(2) + "\n", [4, 2]),
    "two digits": (m(12), [12]),
    "largest": (m(32), [32]),
    "one too many": (m(33), [32]),
    "three digits": (m(100), [32]),
    "huge": (m("9" * 80), [32]),
    "leading zero": (m("05"), [5]),
    "leading zeros": (m("0017"), [17]),
    "spaces around the number": (m(" 3  "), [3]),
    "zero": (m(0), []),
    "zeros": (m("000"), []),
    "zero, then a marker": (m(0) + m(2), [2]),
    "nothing": (m(""), []),
    "a space only": (m(" "), []),
    "a word": (m("the"), []),
    "negative": (m("-3"), []),
    "signed": (m("+3"), []),
    "decimal": (m("3.5"), []),
    "digit and letter": (m("3a"), []),
    "space between digits": (m("1 2"), []),
    "newline in the tag": (m("3\n"), []),
    "digits of another script": (m("٣"), []),
    "another case": (m(3).upper(), []),
    "unclosed": (f"{OPEN_TAG}3", []),
    "unclosed, text follows": (f"{OPEN_TAG}3 the cat", []),
    "never opened": (f"3{CLOSE_TAG}", []),
    "closed twice": (m(3) + CLOSE_TAG, [3]),
    "opened for closed": (f"{OPEN_TAG}3{OPEN_TAG}", []),
    "nested": (f"{OPEN_TAG}{m(4)}{CLOSE_TAG}", [4]),
    "unclosed, then a marker": (f"{OPEN_TAG}3{m(4)}", [4]),
    "unclosed with a space, then a marker": (f"{OPEN_TAG}3 {m(4)}", [4]),
    "opened twice": (f"{OPEN_TAG}{m(4)}", [4]),
    "cut off in the opening tag": (f"<implicit_th{m(4)}", [4]),
    "cut off in the closing tag": (f"{OPEN_TAG}3</impl{m(4)}", [4]),
    "closing tag starts anew": (f"{OPEN_TAG}3</implicit_thought{CLOSE_TAG}", []),
    "cut off at < of the closing tag": (f"{OPEN_TAG}3<{CLOSE_TAG}", []),
    "slash twice": (f"{OPEN_TAG}3</{CLOSE_TAG}", []),
    "doubled <": (f"<{m(4)}", [4]),
    "spaces in the tags": ("< implicit_thought>3</implicit_thought>", []),
}


@cache
def detector_named(name: str, max_latent_steps: int = 32) -> MarkerDetector:
    return MarkerDetector(tokenizer_named(name), max_latent_steps)


@cache
def single_bytes(max_latent_steps: int = 32) -> MarkerDetector:
    """A tokenizer whose ids are the bytes themselves."""
    return MarkerDetector(tokenizer_of(CHARACTERS), max_latent_steps)


def positive_markers(text: bytes) -> int:
    found = re.findall(rb"<implicit_thought> *([0-9]+) *</implicit_thought>", text)
    return sum(int(number) > 0 for number in found)


@pytest.mark.parametrize("name", NAMES)
def test_marker_is_exact_in_every_context(name: str) -> None:
    """Locks out a detector whose answer hangs on the neighbours of a marker or on how tokens cut it up."""
    detector = detector_named(name)
    for context, (text, expected) in CONTEXTS.items():
        ids = tokenizer_named(name).encode(text, add_special_tokens=False)
        if name == "byte_level_bpe-plain":
            assert b"".join(map(detector.token_bytes, ids)).decode() == text
        spans = detector.find(ids)
        assert [span.steps for span in spans] == expected, context
        for count, span in enumerate(spans, 1):
            before = b"".join(map(detector.token_bytes, ids[: span.position]))
            behind = before + detector.token_bytes(ids[span.position])
            assert (positive_markers(before), positive_markers(behind)) == (count - 1, count), context


@pytest.mark.parametrize("context", CONTEXTS)
def test_marker_in_single_bytes(context: str) -> None:
    """Where each token is one byte, positions are those of the closing `>` itself."""
    text, expected = CONTEXTS[context]
    detector = single_bytes()
    spans = detector.find(list(text.encode()))
    assert [span.steps for span in spans] == expected
    assert all(text.encode()[: span.position + 1].endswith(CLOSE_TAG.encode()) for span in spans)


@pytest.mark.parametrize("name", ["byte_level_bpe-plain", "unigram-plain", "sentencepiece_bpe-plain"])
def test_trained_tokens_do_cross_the_tags(name: str) -> None:
    """A control: on these tokenizers a tag is not one fixed run of ids, so the contexts above do test something."""
    detector = detector_named(name)
    borders = set()
    for joint in (".", "\n", " ", "(", "a"):
        tokens = [detector.token_bytes(i) for i in tokenizer_named(name).encode(joint + m(3) + joint)]
        first, last = next(t for t in tokens if b"<" in t), next(t for t in reversed(tokens) if b">" in t)
        borders.add((first, last))
    assert len(borders) > 1


def test_tail_of_the_last_token_is_read_on() -> None:
    """Locks out dropping what follows `>` in the marker's last token, where the next marker may have begun."""
    tokens = [b"<implicit_thought>", b"3", b"</implicit_thought", b"><", b"implicit_thought>", b">"]
    detector = MarkerDetector(tokenizer_of([*tokens, b"><implicit_thought>4"]))
    assert detector.find([0, 1, 2, 3, 4, 1, 2, 5]) == [LatentSpan(3, 3), LatentSpan(7, 3)]
    assert detector.find([0, 1, 2, 6, 2, 5]) == [LatentSpan(3, 3), LatentSpan(5, 4)]


def test_last_of_several_markers_in_one_token_counts() -> None:
    """Locks out the first winning, and a 0 behind a marker wiping it out."""
    whole, zero = m(7).encode(), m(0).encode()
    tokens = [b"<implicit_thought>2</implicit_thought>" + whole, whole + zero, zero, b">" + whole, whole[:-1]]
    detector = MarkerDetector(tokenizer_of(tokens))
    assert detector.find([0]) == [LatentSpan(0, 7)]
    assert detector.find([1, 2]) == [LatentSpan(0, 7)]
    assert detector.find([4, 3]) == [LatentSpan(1, 7)]


def test_special_and_unknown_ids_break_a_marker() -> None:
    """Locks out reading over an end of sequence, over padded embedding rows and over ignore labels."""
    detector = single_bytes()
    eos = detector.tokenizer.eos_token_id
    ids = list(m(5).encode())
    assert eos == 256 and detector.token_bytes(eos) == b""
    for barrier in (eos, 257, 10**6, -1, -100):
        assert detector.is_opaque(barrier)
        for cut in range(1, len(ids)):
            broken = [*ids[:cut], barrier, *ids[cut:]]
            assert detector.find(broken) == []
        assert detector.find([barrier, *ids, barrier, *ids]) == [
            LatentSpan(len(ids), 5),
            LatentSpan(2 * len(ids) + 1, 5),
        ]


@pytest.mark.parametrize("barrier", [-100, -1, 4, 5, 10**6])
def test_ids_out_of_range_are_not_read_as_the_nearest_token(barrier: int) -> None:
    """Locks out clamping: here the first and the last id are digits, so a clamped id would make a marker."""
    detector = MarkerDetector(tokenizer_of([b"5", OPEN_TAG.encode(), CLOSE_TAG.encode(), b"6"], eos=None))
    for middle, expected in ((0, 5), (3, 6), (barrier, 0)):
        ids = [1, middle, 2]
        states, state = torch.tensor([detector.initial_state]), detector.initial_state
        for token in ids:
            states, steps = detector.advance(states, torch.tensor([token]))
            state, steps_one = detector.advance_one(state, token)
        assert (steps.item(), steps_one) == (expected, expected)
        assert detector.find(ids) == ([LatentSpan(2, expected)] if expected else [])


@pytest.mark.parametrize("name", NAMES)
def test_marker_ids_read_back(name: str) -> None:
    """Locks out markers that training writes and the detector does not see, for every number."""
    detector = detector_named(name)
    assert detector.has_marker_tokens == name.endswith("-tags")
    for n in (*range(1, 35), 99, 128):
        ids = detector.marker_ids(n)
        assert detector.find(ids) == [LatentSpan(len(ids) - 1, min(n, 32))]
        assert b"".join(map(detector.token_bytes, ids)).strip() == m(n).encode()
    with pytest.raises(ValueError, match="must be 1 or more"):
        detector.marker_ids(0)


@pytest.mark.parametrize("name", TAGGED)
def test_marker_ids_use_the_tag_tokens(name: str) -> None:
    """Tags are tokens, the number between them is ordinary digits without a space of SentencePiece's."""
    tokenizer, detector = tokenizer_named(name), detector_named(name)
    opened, *digits, closed = detector.marker_ids(12)
    assert (opened, closed) == tuple(tokenizer.convert_tokens_to_ids([OPEN_TAG, CLOSE_TAG]))
    assert b"".join(map(detector.token_bytes, digits)) == b"12"


def test_tokenizer_that_cannot_write_a_marker_is_refused() -> None:
    """The message has to say what to do, and adding the tags has to help."""
    tokenizer = tokenizer_of([b"a", *(b"%d" % digit for digit in range(10))])
    with pytest.raises(ValueError, match=r"add_tokens\(\['<implicit_thought>', '</implicit_thought>'\]"):
        MarkerDetector(tokenizer).marker_ids(3)
    tokenizer.add_tokens([OPEN_TAG, CLOSE_TAG], special_tokens=True)
    assert len(MarkerDetector(tokenizer).marker_ids(31)) == 4


@pytest.mark.parametrize("limit", [1, 2, 9, 10, 99, 100, MAX_LATENT_STEPS_LIMIT])
def test_numbers_saturate_at_any_limit(limit: int) -> None:
    """Locks out overflow of the packed table and off-by-one at the limit."""
    detector = single_bytes(limit)
    for n in (1, limit - 1, limit, limit + 1, 10 * limit, 10**30):
        ids = list(m(n).encode())
        assert detector.find(ids) == ([LatentSpan(len(ids) - 1, min(n, limit))] if n else [])
        state = torch.tensor([detector.initial_state])
        for token in ids:
            state, steps = detector.advance(state, torch.tensor([token]))
        assert steps.tolist() == [min(n, limit)]


@pytest.mark.parametrize("limit", [0, -1, MAX_LATENT_STEPS_LIMIT + 1])
def test_limit_out_of_range_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_latent_steps is {limit}; it must be from 1"):
        single_bytes(limit)


def test_batch_edges() -> None:
    """Empty batches and rows give no spans; a marker must not run from one row into the next."""
    detector = single_bytes()
    ids = list(m(5).encode())
    empty = torch.zeros(0, 4, dtype=torch.long)
    assert detector.find([]) == []
    assert detector.find_batch(empty, empty) == []
    assert detector.find_batch(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0)) == [[], []]
    split = torch.tensor([ids[:20], [*ids[20:38], 0, 0]])
    assert detector.find_batch(split, torch.ones_like(split)) == [[], []]
    row = torch.tensor([ids])
    assert detector.find_batch(row, torch.zeros_like(row, dtype=torch.bool)) == [[]]
    with pytest.raises(ValueError, match=r"\(1, 38\).*\(1, 37\)"):
        detector.find_batch(row, torch.ones(1, 37))


def test_detector_can_be_copied_and_pickled() -> None:
    """A policy is deep-copied for the frozen reference and sent to other processes."""
    detector = MarkerDetector(tokenizer_named("byte_level_bpe-tags"))
    ids = detector.marker_ids(9)
    detector.advance(torch.tensor([0]), torch.tensor([ids[0]]))
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert other.find(ids) == detector.find(ids) == [LatentSpan(len(ids) - 1, 9)]
