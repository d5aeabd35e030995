"""The marker automaton over vLLM's tokens, against the regex that the detector itself is tested against."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrscale.rollout.vllm.position_automaton import PositionAutomaton, steps_to_come
from lrscale.rollout.vllm.stream import prompt_positions, split
from tests.unit.latent.test_marker_oracle import detector_named, id_rows, oracle

SLOW = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", ["fragments", "byte_level_bpe-plain", "unigram-tags"])
def test_random_ids_with_latent_positions(name: str) -> None:
    """Locks out a run that begins elsewhere or has another length than in the trainer, wherever a sequence is cut."""
    detector = detector_named(name)
    latent = len(detector.tokenizer) + 10
    automaton = PositionAutomaton(detector, latent)

    @SLOW
    @given(id_rows(name), st.randoms(use_true_random=False))
    def check(rows: list[list[int]], rng: random.Random) -> None:
        streams, walks = [], []
        for row in rows:
            ids, expected = with_runs(row, {span.position: span.steps for span in oracle(detector, row)}, latent)
            whole = automaton.along(0, np.array(ids, dtype=np.int64))
            assert steps_to_come(whole).tolist() == expected
            cut = rng.randint(0, len(ids))
            state = int(whole[cut - 1]) if cut else 0
            assert np.array_equal(automaton.along(state, np.array(ids[cut:], dtype=np.int64)), whole[cut:])
            streams.append(ids)
            walks.append(whole.tolist())
            assert prompt_positions(row, detector, latent) == without_last_run(ids, latent)
        assert one_by_one(automaton, streams) == walks

    check()


def with_runs(row: list[int], steps_at: dict[int, int], latent: int) -> tuple[list[int], list[int]]:
    """A row with latent ids behind its markers, and the steps that follow each of its positions."""
    ids: list[int] = []
    to_come: list[int] = []
    for position, token in enumerate(row):
        steps = steps_at.get(position, 0)
        ids += [token, *[latent] * steps]
        to_come += [*range(steps, 0, -1), 0] if steps else [0]
    return ids, to_come


def without_last_run(ids: list[int], latent: int) -> list[int]:
    while ids and ids[-1] == latent:
        ids = ids[:-1]
    return ids


def one_by_one(automaton: PositionAutomaton, rows: list[list[int]]) -> list[list[int]]:
    """All rows side by side, as in decoding; those that have ended go on with an ordinary token."""
    packed = torch.zeros(len(rows), dtype=torch.long)
    states: list[list[int]] = [[] for _ in rows]
    for position in range(max(map(len, rows), default=0)):
        packed = automaton.advance(packed, torch.tensor([row[position] if position < len(row) else 0 for row in rows]))
        for row, known, state in zip(rows, states, packed.tolist(), strict=True):
            known += [state] if position < len(row) else []
    return states


def test_a_token_inside_a_run_ends_it() -> None:
    """A prompt may hold a marker as plain text; its steps must not be made up for later."""
    detector = detector_named("unigram-tags")
    latent = len(detector.tokenizer)
    automaton = PositionAutomaton(detector, latent)
    marker = detector.marker_ids(6)
    letter = detector.tokenizer.convert_tokens_to_ids("a")
    ids = np.array([*marker, latent, letter, latent, letter])
    assert steps_to_come(automaton.along(0, ids)).tolist()[len(marker) - 1 :] == [6, 5, 0, 0, 0]


def test_split() -> None:
    """Runs at the start (the prompt's marker), in the middle and cut at the end, as the records have them."""
    tokens, logprobs = [9, 9, 1, 2, 9, 3, 9, 9], [0.0, 0.0, -1.0, -2.0, 0.0, -3.0, 0.0, 0.0]
    assert split(tokens, logprobs, 9) == ((1, 2, 3), (-1.0, -2.0, -3.0), ((-1, 2), (1, 1), (2, 2)))
    assert split([], [], 9) == ((), (), ())
    with pytest.raises(ValueError, match="generate this completion again"):
        split([1], [float("nan")], 9)
