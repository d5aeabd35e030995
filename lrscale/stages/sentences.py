r"""Traces cut into sentences, and some of the sentences replaced by markers (method, section 6).

    completion ids -> bytes of each token -> text -> pysbd -> token ranges -> some become markers

Nothing is ever tokenised again: a sentence is a range of the completion's own ids, and all ranges
joined are those ids. Where a token reaches over the border of two sentences it stays with the
first; white space belongs to the sentence that follows it.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import pysbd

from lrscale.config.stages import TracesConfig
from lrscale.latent.marker import CLOSE_TAG, OPEN_TAG, MarkerDetector
from lrscale.tasks.boxed import boxed_answer

_BOX = r"\boxed{"
_UNKNOWN = b"\xff"
"""Stands for the unknown token, which is a character that the vocabulary lacks: part of its sentence."""
_LONE_BYTE = re.compile("[\udc80-\udcff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters, some of which pysbd fails on (it reads `\\x1c3` as a number)."""
_ENUMERATOR = re.compile(r"[\W_]*(?:\d{1,4}|[A-Za-z]|[ivx]{1,5}|[IVX]{1,5})[\W_]*")
"""A piece that is only the number of what follows: `3.`, `(b)`, `**IV.**`."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """Token range [start, stop) of a completion."""

    start: int
    stop: int
    replaceable: bool
    """False for a marker, for a token that stands for no text, and where there is nothing but punctuation."""


@dataclass(frozen=True, slots=True)
class LiteTrace:
    """A trace with markers in place of some sentences."""

    completion_ids: tuple[int, ...]
    replaced: tuple[tuple[int, ...], ...]
    """One entry a marker of completion_ids, in order: the ids of what it replaces (a sentence, or several that follow
    each other), () for a marker that the trace had before."""


def split_sentences(completion_ids: Sequence[int], detector: MarkerDetector) -> list[Sentence]:
    r"""The sentences before the one with the final `\boxed{...}`, one after the other without a gap.

    The piece with the box and all behind it are left out: they are never replaced. Without a closed box
    the last sentence is left out in its place. Markers are pieces of their own, and end a sentence.
    """
    unknown_id = _unknown_id(detector)
    tokens = [_UNKNOWN if i == unknown_id else detector.token_bytes(i) for i in completion_ids]
    opaque = [i != unknown_id and detector.is_opaque(i) for i in completion_ids]
    pieces: list[Sentence] = []
    stop = 0
    fixed = _fixed_ranges(opaque, tokens, [span.position for span in detector.find(completion_ids)])
    for start, fixed_stop in [*fixed, (len(tokens), len(tokens))]:
        pieces += [
            Sentence(a + stop, b + stop, _has_words(tokens[a + stop : b + stop])) for a, b in _split(tokens[stop:start])
        ]
        if fixed_stop > start:
            pieces.append(Sentence(start, fixed_stop, replaceable=False))
        stop = fixed_stop
    return pieces[: _answer_piece(pieces, tokens)]


def lite_traces(
    completion_ids: Sequence[int], detector: MarkerDetector, config: TracesConfig, rng: random.Random
) -> list[LiteTrace]:
    """One lite trace for each of the recipe's ratios; none where no sentence can be replaced."""
    sentences = split_sentences(completion_ids, detector)
    made = (
        replace_with_markers(completion_ids, sentences, detector, config, ratio, rng) for ratio in config.replace_ratios
    )
    return [trace for trace in made if trace is not None]


def replace_with_markers(
    completion_ids: Sequence[int],
    sentences: Sequence[Sentence],
    detector: MarkerDetector,
    config: TracesConfig,
    ratio: float,
    rng: random.Random,
) -> LiteTrace | None:
    """Replace int(ratio x sentences) of the replaceable sentences, at least one, drawn at random.

    A sentence of n tokens becomes the marker with N = clamp(int(token_ratio x n), 1, max_steps), N never
    above what the detector lets a marker be worth. With `merge_neighbours`, sentences that follow each other
    share a marker of their steps together, as long as these stay within the same limits. None where there is
    no sentence to replace.
    """
    candidates = [sentence for sentence in sentences if sentence.replaceable]
    if not candidates:
        return None
    count = max(1, int(ratio * len(candidates) + 1e-9))  # 0.29 x 100 is 28.99... in floating point
    chosen = rng.sample(candidates, min(count, len(candidates)))
    ids: list[int] = []
    replaced_at: dict[int, tuple[int, ...]] = {}
    copied = 0
    for start, stop, steps in _replacements(chosen, config, min(config.max_steps, detector.max_latent_steps)):
        ids += [*completion_ids[copied:start], *detector.marker_ids(steps)]
        replaced_at[len(ids) - 1] = tuple(completion_ids[start:stop])
        copied = stop
    ids += completion_ids[copied:]
    markers = [span.position for span in detector.find(ids)]
    assert replaced_at.keys() <= set(markers), "a marker that was put in is not found again"
    return LiteTrace(tuple(ids), tuple(replaced_at.get(position, ()) for position in markers))


def _replacements(chosen: Sequence[Sentence], config: TracesConfig, max_steps: int) -> list[tuple[int, int, int]]:
    """(start, stop, latent steps) of each marker to be put in, in order."""
    made: list[tuple[int, int, int]] = []
    for sentence in sorted(chosen, key=lambda s: s.start):
        length = sentence.stop - sentence.start
        steps = min(max(int(config.token_ratio * length + 1e-9), 1), max_steps)
        if config.merge_neighbours and made and made[-1][1] == sentence.start and made[-1][2] + steps <= max_steps:
            start, _, before = made.pop()
            made.append((start, sentence.stop, before + steps))
        else:
            made.append((sentence.start, sentence.stop, steps))
    return made


def _fixed_ranges(opaque: list[bool], tokens: list[bytes], marker_ends: list[int]) -> list[tuple[int, int]]:
    """Token ranges that no sentence may reach into: markers, and ids that stand for no text."""
    starts = _starts(tokens)
    text = b"".join(tokens)
    ranges = [(i, i + 1) for i, is_opaque in enumerate(opaque) if is_opaque]
    for position in marker_ends:
        close = text.rfind(CLOSE_TAG.encode(), 0, starts[position] + len(tokens[position]))
        opening = text.rfind(OPEN_TAG.encode(), 0, close)
        ranges.append((bisect_right(starts, opening) - 1, position + 1))
    ranges.sort()
    apart: list[tuple[int, int]] = []
    for start, stop in ranges:  # adjacent markers may share a token (`><`): it stays with the first
        start = max(start, apart[-1][1] if apart else 0)
        if start < stop:
            apart.append((start, stop))
    return apart


def _answer_piece(pieces: list[Sentence], tokens: list[bytes]) -> int:
    """Index of the piece that holds the final box; without one, of the last replaceable piece."""
    text = b"".join(tokens).decode("latin-1")  # one character a byte; the box itself is ASCII
    box = text.rfind(_BOX)
    while box >= 0 and boxed_answer(text[box:]) is None:
        box = text.rfind(_BOX, 0, box)
    if box < 0:
        return max((i for i, piece in enumerate(pieces) if piece.replaceable), default=0)
    box_token = bisect_right(_starts(tokens), box) - 1
    return next(i for i, piece in enumerate(pieces) if piece.stop > box_token)


def _split(tokens: list[bytes]) -> list[tuple[int, int]]:
    """Sentences of a stretch of tokens without markers, as ranges that cover it."""
    # An escaped byte is one character, so that half a UTF-8 character moves no offset.
    text = b"".join(tokens).decode("utf-8", errors="surrogateescape")
    byte_offsets = [0, *accumulate(map(_byte_length, text))]
    starts = _starts(tokens)
    cuts = {0, len(tokens)}
    readable = _CONTROL.sub(" ", _LONE_BYTE.sub("\ufffd", text))
    for span in _segmenter().segment(readable):
        start = span.start
        while start > 0 and text[start - 1].isspace():
            start -= 1
        cuts.add(bisect_left(starts, byte_offsets[start]))
    return _merged(list(pairwise(sorted(cuts))), tokens)


def _merged(ranges: list[tuple[int, int]], tokens: list[bytes]) -> list[tuple[int, int]]:
    """Join what pysbd cuts too fine: `3.` belongs to what follows it, a lone bracket to what it closes."""
    merged: list[tuple[int, int]] = []
    carried: int | None = None
    for start, stop in ranges:
        first = start if carried is None else carried
        text = _text(tokens[start:stop])
        if stop < ranges[-1][1] and _ENUMERATOR.fullmatch(text):
            carried = first
            continue
        carried = None
        if merged and first == start and not any(map(str.isalnum, text)):
            first = merged.pop()[0]
        merged.append((first, stop))
    return merged


def _unknown_id(detector: MarkerDetector) -> int | None:
    tokenizer = detector.tokenizer
    # GPT-2's unknown token is its end token, and no character.
    controls = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in controls else tokenizer.unk_token_id


@cache
def _segmenter() -> pysbd.Segmenter:
    return pysbd.Segmenter(language="en", clean=False, char_span=True)


def _starts(tokens: list[bytes]) -> list[int]:
    """Byte offset of each token's first byte."""
    return list(accumulate(map(len, tokens), initial=0))[:-1]


def _byte_length(character: str) -> int:
    code = ord(character)
    if code < 0x80 or 0xDC80 <= code <= 0xDCFF:  # the latter: an escaped byte
        return 1
    return 2 if code < 0x800 else 3 if code < 0x10000 else 4


def _text(tokens: list[bytes]) -> str:
    return b"".join(tokens).decode("utf-8", errors="replace")


def _has_words(tokens: list[bytes]) -> bool:
    return any(map(str.isalnum, _text(tokens)))
