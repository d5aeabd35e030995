"""Sentence splitting and marker replacement on token ids, for several families of tokenizers."""

from __future__ import annotations

import random
import time
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lrscale.config.stages import TracesConfig
from lrscale.config.task import FlawedStoriesConfig
from lrscale.latent.marker import MarkerDetector
from lrscale.stages.sentences import LiteTrace, Sentence, lite_traces, replace_with_markers, split_sentences
from lrscale.tasks.flawed_stories import FlawedStories, traced
from tests.unit.latent.trained_tokenizers import EOS, NAMES, tokenizer_named, tokenizer_of

CONFIG = TracesConfig()
# One token a byte, one of them half a character of its own accord; and tokens that reach over borders.
BYTES = tokenizer_of([bytes([b]) for b in range(256)] + [b".\n\n", b". A", b"><", b" \xc3", b"\xa9.", b"3. "])


@cache
def detector_of(name: str) -> MarkerDetector:
    """`bytes`, `tiny` (the tokenizer that ships with the package), or one of NAMES."""
    if name == "tiny":
        assets = Path(str(files("lrscale.tasks"))) / "assets" / "tiny_base"
        return MarkerDetector(AutoTokenizer.from_pretrained(assets))
    return MarkerDetector(BYTES if name == "bytes" else tokenizer_named(name))


def encode(detector: MarkerDetector, text: str) -> list[int]:
    if detector is detector_of("bytes"):
        return list(text.encode())
    return detector.tokenizer.encode(text, add_special_tokens=False)


def texts(ids: list[int], sentences: list[Sentence], detector: MarkerDetector) -> list[str]:
    """The text of each sentence, and that of the answer behind them."""
    ends = [s.stop for s in sentences]
    pieces = [ids[a:b] for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)]
    return [b"".join(map(detector.token_bytes, piece)).decode(errors="replace") for piece in pieces]


def split(text: str, name: str = "bytes") -> list[str]:
    detector = detector_of(name)
    ids = encode(detector, text)
    return texts(ids, split_sentences(ids, detector), detector)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_is_lost_or_tokenised_anew(name: str) -> None:
    """Joined pieces are the completion's own ids, whatever the tokenizer does at sentence borders.

    The last family has no bytes to fall back on: a character it does not know may not cut a sentence in two.
    """
    detector = detector_of(name)
    text = "The cat was in Rome. It was größer!\nSo <implicit_thought>4</implicit_thought> the 42. Then \\boxed{7}."
    ids = encode(detector, text)
    sentences = split_sentences(ids, detector)
    assert sentences[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(sentences))
    markers = [s for s in sentences if not s.replaceable]
    (span,) = detector.find(ids)
    assert span.position == markers[0].stop - 1, "the marker is a piece of its own, up to its last token"
    pieces = texts(ids, sentences, detector)
    assert len(pieces) > 4 and all(piece.count(".") == 1 for piece in (pieces[0], pieces[-1]))
    for trace in lite_traces(ids, detector, CONFIG, random.Random(0)):
        assert_only_sentences_changed(ids, trace, detector)


def assert_only_sentences_changed(ids: list[int], trace: LiteTrace, detector: MarkerDetector) -> None:
    """Putting each replaced sentence back where its marker stands gives the original ids exactly."""
    spans = detector.find(trace.completion_ids)
    assert len(spans) == len(trace.replaced)
    restored: list[int] = []
    copied = 0
    for span, replaced in zip(spans, trace.replaced, strict=True):
        if not replaced:
            continue
        start = span.position + 1 - len(detector.marker_ids(span.steps))
        assert trace.completion_ids[start : span.position + 1] == detector.marker_ids(span.steps)
        assert span.steps == min(max(int(0.2 * len(replaced)), 1), 5)
        restored += [*trace.completion_ids[copied:start], *replaced]
        copied = span.position + 1
    assert [*restored, *trace.completion_ids[copied:]] == ids


PIECES = st.sampled_from(
    [
        "Anna went. ",
        "He (b) e.g. Mr. X",
        " 3. ",
        ".\n\n",
        "é",
        "\u2028",
        "…",
        "<implicit_thought>",
        "2",
        "</implicit_thought>",
        "<implicit_thought>12</implicit_thought>",
        "\\boxed{Yes}",
        "\\boxed{",
        "}",
        '"No!" ',
        "   ",
        "∯",
        "☃. ",
        "a)",
        "*",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=12), st.lists(st.integers(0, 270), max_size=6), st.integers(0, 3))
def test_any_sequence_of_ids_survives(parts: list[str], noise: list[int], seed: int) -> None:
    """Half characters, tokens over borders, opaque and unknown ids, unclosed tags: nothing moves, nothing is lost."""
    detector = detector_of("bytes")
    rng = random.Random(seed)
    ids = list("".join(parts).encode())
    for token in noise:
        ids.insert(rng.randint(0, len(ids)), token)
    sentences = split_sentences(ids, detector)
    stop = 0
    for sentence in sentences:
        assert sentence.start == stop < sentence.stop
        stop = sentence.stop
        if sentence.replaceable:
            assert not any(map(detector.is_opaque, ids[sentence.start : sentence.stop]))
    assert stop <= len(ids)
    for span in detector.find(ids[:stop]):
        assert any(s.stop == span.position + 1 and not s.replaceable for s in sentences)
    for trace in lite_traces(ids, detector, CONFIG, rng):
        assert_only_sentences_changed(ids, trace, detector)


@pytest.mark.parametrize(("world", "name"), [("ring", "bytes"), ("village", "bytes"), ("ring", "tiny")])
@pytest.mark.parametrize("whole", [True, False])
def test_one_event_is_one_sentence(world: str, name: str, whole: bool) -> None:  # noqa: FBT001 - a pytest parameter
    """pysbd cuts `12.` off where the numbers of a trace have gaps: the number would stay and its event go."""
    task = FlawedStories(FlawedStoriesConfig(world=world, events=(6, 16)), seed=0)
    for index in range(30):
        story = task.story("train", index)
        rng = random.Random(index)
        events = [line for line in story.trace if whole or rng.random() < 0.6]
        answer = rf"\boxed{{{story.answer}}}"
        found = split(" ".join([*events, answer]), name)
        assert [piece.strip() for piece in found] == [*events, answer]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'Dr. Smith said, "Where is it? I lost it." He left at 5 p.m. on Monday. So \\boxed{No}',
            ['Dr. Smith said, "Where is it? I lost it."', " He left at 5 p.m. on Monday.", " So \\boxed{No}"],
        ),
        (
            "Mr. Jones (e.g. the baker) agreed!\n\nThen... nothing.\n\nThe U.S. won. \\boxed{Yes}.",
            ["Mr. Jones (e.g. the baker) agreed!", "\n\nThen... nothing.", "\n\nThe U.S. won.", " \\boxed{Yes}."],
        ),
        (
            "It is 3.14 or 2. Fine, 2+2=4. 4+4=8. \\boxed{8}",
            ["It is 3.14 or 2.", " Fine, 2+2=4.", " 4+4=8.", " \\boxed{8}"],
        ),
        ("- One thing.\n- Another thing.\n\\boxed{A}", ["- One thing.", "\n- Another thing.", "\n\\boxed{A}"]),
        ("Él está aquí. Größe: 5 €. \\boxed{Sí}", ["Él está aquí.", " Größe: 5 €.", " \\boxed{Sí}"]),
        ("  Leading space. No. No. \\boxed{N}", ["  Leading space.", " No.", " No.", " \\boxed{N}"]),
    ],
)
def test_ordinary_prose(text: str, expected: list[str]) -> None:
    """Abbreviations, dialogue, decimals, lists, newlines; white space goes with what follows."""
    assert split(text) == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("One. Two. I say \\boxed{No}. Or \\boxed{Yes}. Bye.", " Or \\boxed{Yes}. Bye."),
        ("One. Two. So \\boxed{Yes} it is. And \\boxed{ cut", " So \\boxed{Yes} it is. And \\boxed{ cut"),
        ("\\boxed{Yes}", "\\boxed{Yes}"),
        ("One. Two. Three.", " Three."),
        ("One. Two.<implicit_thought>2</implicit_thought>", " Two.<implicit_thought>2</implicit_thought>"),
        ("", ""),
    ],
)
def test_the_answer_stays_plain(text: str, answer: str) -> None:
    """A trace whose answer is replaced would teach the projector to end without one."""
    assert split(text)[-1] == answer


def test_tokens_over_a_border_stay_with_the_sentence_they_end() -> None:
    """Locks out a full stop or half a character that is copied into both pieces or into none."""
    detector = detector_of("bytes")
    two_newlines, stop_and_a, half, other_half = 256, 257, 259, 260
    ids = [*b"It is", half, other_half, *b" Yes", two_newlines, *b"He is", stop_and_a, *b" man. ", *b"\\boxed{X}"]
    pieces = texts(ids, split_sentences(ids, detector), detector)
    assert pieces == ["It is é.", " Yes.\n\n", "He is. A", " man.", " \\boxed{X}"]


def test_markers_are_kept_whole_and_special_tokens_stay() -> None:
    """Adjacent markers that share a token, and an end token in the middle, are never part of a sentence."""
    detector = detector_of("bytes")
    eos = detector.tokenizer.convert_tokens_to_ids(EOS)
    open_two, close_shared = list(b"<implicit_thought>2</implicit_thought"), 258
    three = list(b"implicit_thought>3</implicit_thought>")
    ids = [*b"One.", *open_two, close_shared, *three, *b" Two", eos, *b". Three. ", *b"\\boxed{X}", eos]
    sentences = split_sentences(ids, detector)
    assert [s.replaceable for s in sentences] == [True, False, False, True, False, False, True]
    assert texts(ids, sentences, detector)[1:3] == [
        "<implicit_thought>2</implicit_thought><",
        "implicit_thought>3</implicit_thought>",
    ]
    trace = replace_with_markers(ids, sentences, detector, CONFIG, 1.0, random.Random(0))
    assert [bytes(r) for r in trace.replaced] == [b"One.", b"", b"", b" Two", b" Three."]
    assert trace.completion_ids.count(eos) == 2


def test_share_steps_and_seed() -> None:
    """The share is int(ratio x sentences), at least 1; N is clamped to [1, max_steps]; draws repeat with the seed."""
    detector = detector_of("bytes")
    ids = list((" ".join(["Aa."] * 10 + ["B" * 12 + "."] * 5 + ["C" * 90 + "."] * 5) + " \\boxed{Yes}").encode())
    sentences = split_sentences(ids, detector)
    assert len(sentences) == 20
    for ratio, count in ((0.01, 1), (0.10, 2), (0.25, 5), (0.349, 6), (0.35, 7), (1.0, 20)):
        trace = replace_with_markers(ids, sentences, detector, CONFIG, ratio, random.Random(1))
        assert len(trace.replaced) == count
    spans = detector.find(trace.completion_ids)
    assert [span.steps for span in spans] == [1] * 10 + [2] * 5 + [5] * 5
    draws = {tuple(lite_traces(ids, detector, CONFIG, random.Random(seed))) for seed in (1, 1, 2)}
    assert len(draws) == 2
    assert [len(t.replaced) for t in lite_traces(ids, detector, CONFIG, random.Random(1))] == [2, 5]


def test_neighbours_share_a_marker_as_far_as_its_steps_go() -> None:
    """Locks out a marker that stands for sentences apart, for more steps than it may be worth, or for another text."""
    detector = detector_of("bytes")
    ids = list(b"Ten bytes. Ten bytes. Ten bytes. Ten bytes. \\boxed{X}")
    config = CONFIG.model_copy(update={"merge_neighbours": True, "max_steps": 6})
    sentences = split_sentences(ids, detector)
    trace = replace_with_markers(ids, sentences, detector, config, 1.0, random.Random(0))
    assert [span.steps for span in detector.find(trace.completion_ids)] == [6, 2]
    assert [bytes(r) for r in trace.replaced] == [b"Ten bytes. Ten bytes. Ten bytes.", b" Ten bytes."]
    for seed in range(20):
        trace = replace_with_markers(ids, sentences, detector, config, 0.5, random.Random(seed))
        assert [len(r) // 10 for r in trace.replaced] in ([2], [1, 1])


def test_steps_stay_within_what_a_marker_may_be_worth() -> None:
    """A marker with a number above max_latent_steps would claim steps that are never taken."""
    detector = MarkerDetector(BYTES, max_latent_steps=3)
    ids = list(b"A sentence of many bytes it is. \\boxed{X}")
    trace = replace_with_markers(ids, split_sentences(ids, detector), detector, CONFIG, 1.0, random.Random(0))
    assert b"<implicit_thought>3</" in bytes(trace.completion_ids)


def test_nothing_to_replace_is_no_trace() -> None:
    """An unchanged trace among lite ones has no marker, so nothing behind it to learn from."""
    detector = detector_of("bytes")
    for text in ("\\boxed{Yes}", "", "... \\boxed{Yes}", "Only this."):
        assert lite_traces(list(text.encode()), detector, CONFIG, random.Random(0)) == []


def test_fast_enough_for_a_traces_stage() -> None:
    """5,000 traces are to be split in well under a minute of CPU (the stage runs while nothing else does)."""
    detector = detector_of("bytes")
    task = FlawedStories(FlawedStoriesConfig(world="ring", events=(6, 16)), seed=1)
    traces = [list(traced(task.story("train", index)).encode()) for index in range(40)]
    split_sentences(traces[0], detector)
    begin = time.process_time()
    for ids in traces:
        lite_traces(ids, detector, CONFIG, random.Random(0))
    assert (time.process_time() - begin) / len(traces) < 0.02
