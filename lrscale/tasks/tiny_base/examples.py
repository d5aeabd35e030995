"""What the tiny base is trained on: explicit traces, and traces in which soft inputs stand for some sentences.

The traces are those of a careless writer, who slips now and then: the base learns to reason, and to slip as
often. So it leaves RL, which rewards care, something to gain, without being short of skill.

A soft input is an input embedding that is no token: here the mean embedding of a piece of a sentence. One marker may
stand for several sentences that follow each other, with the soft inputs of all of them behind it.
A base that has read such inputs can make sense of latents later on. It is never trained to go on
behind an empty marker, which would teach it to do without them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrscale.tasks.flawed_stories import FlawedStories
from lrscale.tasks.ring import careless_notes

SOFT = -1
"""Stands in an example's token ids where a soft input goes."""
SOFT_PER_SENTENCE = 2
LONGEST_RUNS = (1, 2, 4, 4)
"""How many sentences a marker may stand for, drawn anew for each example."""

CONCLUSION_SHARE = 0.8

_REPLACED_SHARE = (0.1, 1.1)
"""Drawn uniformly; what is past 1 gives examples without any sentence in words."""
_BATCHES_PER_POOL = 8


@dataclass(slots=True)
class Example:
    """One training sequence of T positions."""

    ids: list[int]
    """[T] token ids, SOFT at soft inputs."""
    learned: list[bool]
    """[T] whether the token is a target of the ordinary next-token loss."""
    soft: list[list[int]] = field(default_factory=list)
    """Token ids behind each soft input, in order of the SOFT positions."""
    bags: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    """(position, {token id: share}): the distribution that the position's output shall be."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B examples, padded on the right to T positions. Indices are (row, position) pairs."""

    ids_BT: Tensor
    """[B, T] with 0 at soft inputs and padding."""
    learned_BT: Tensor
    """[B, T] bool."""
    soft_index_2N: Tensor
    """[2, N] rows and positions of the soft inputs."""
    soft_weights_NV: Tensor
    """[N, V] soft input n is this row times the embedding matrix."""
    bag_index_2M: Tensor
    bag_targets_MV: Tensor
    """[M, V] a distribution over tokens each."""
    tokens: int


class Examples:
    """Draws examples: story i of the task's train split is example i."""

    def __init__(
        self,
        task: FlawedStories,
        tokenizer: PreTrainedTokenizerBase,
        *,
        soft_share: float,
        slip_share: float,
        seed: int,
    ) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._soft_share = soft_share
        self._slip_share = slip_share
        self._rng = random.Random(f"tiny-base/{seed}")
        self._next = 0
        self._now_id = self._encode(", now")[-1]

    def batches(self, rows: int) -> Iterator[Batch]:
        """Endless batches; a pool of eight is sorted by length first, so that little is padding."""
        while True:
            pool = sorted((self.draw() for _ in range(rows * _BATCHES_PER_POOL)), key=lambda example: len(example.ids))
            parts = [pool[start : start + rows] for start in range(0, len(pool), rows)]
            self._rng.shuffle(parts)
            for part in parts:
                yield collate(part, vocabulary=len(self._tokenizer))

    def draw(self) -> Example:
        """The next example: an explicit trace, or (soft_share of the time) one with markers and soft inputs."""
        return self.with_markers() if self._rng.random() < self._soft_share else self.explicit()

    def explicit(self) -> Example:
        """The prompt without the marker sentence, and the whole trace."""
        example, sentences, answer = self._begin(markers=False)
        for sentence in [*sentences, answer]:
            _append(example, sentence, learned=True)
        return example

    def with_markers(self) -> Example:
        """The prompt with the marker sentence; runs of sentences are a marker and the soft inputs of their pieces."""
        example, sentences, answer = self._begin(markers=True)
        longest = self._rng.choice(LONGEST_RUNS)
        count = max(1, round(self._rng.uniform(*_REPLACED_SHARE) * len(sentences)))
        replaced = set(self._rng.sample(range(len(sentences)), min(count, len(sentences))))
        index = 0
        while index < len(sentences):
            run = _run_from(index, replaced, longest)
            if run:
                self._append_run(example, [sentences[place] for place in run])
            else:
                _append(example, sentences[index], learned=True)
            index += max(1, len(run))
        _append(example, answer, learned=True)
        return example

    def _append_run(self, example: Example, run: Sequence[list[int]]) -> None:
        marker = f"<implicit_thought>{SOFT_PER_SENTENCE * len(run)}</implicit_thought>"
        _append(example, self._encode(marker), learned=True)
        for sentence in run:
            for number in range(SOFT_PER_SENTENCE):
                start, stop = (len(sentence) * edge // SOFT_PER_SENTENCE for edge in (number, number + 1))
                # The position before a soft input shall say what the soft input will hold.
                example.bags.append((len(example.ids) - 1, self._bag(sentence[start:stop])))
                example.soft.append(sentence[start:stop])
                _append(example, [SOFT], learned=False)

    def _bag(self, piece: Sequence[int]) -> dict[int, float]:
        """Uniform over the piece's tokens, but most of it on the conclusion: the place and the verdict behind `now`.

        Spread evenly, the only two words that have to be worked out are lost among those that can be copied from the
        story, and the base never learns to work them out where soft inputs stand (LOG.md of benchmarks/science).
        """
        shares = _uniform(piece)
        if self._now_id not in piece:
            return shares
        place = piece.index(self._now_id) + 1
        conclusion = [piece[place], piece[place + 2]]
        shares = {token: share * (1.0 - CONCLUSION_SHARE) for token, share in shares.items()}
        for token in conclusion:
            shares[token] += CONCLUSION_SHARE / len(conclusion)
        return shares

    def _begin(self, *, markers: bool) -> tuple[Example, list[list[int]], list[int]]:
        story = self._task.story("train", self._next)
        prompt = self._task.prompt("train", self._next, markers=markers)
        self._next += 1
        prompt_ids = self._tokenizer(prompt.text)["input_ids"]
        notes, verdict = careless_notes(story, self._rng, slip_share=self._slip_share)
        sentences = [self._encode(sentence) for sentence in notes]
        answer = [*self._encode(rf" \boxed{{{verdict}}}"), self._tokenizer.eos_token_id]
        return Example(list(prompt_ids), [False] * len(prompt_ids)), sentences, answer

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _run_from(first: int, replaced: set[int], longest: int) -> range:
    """The sentences from `first` on that go behind one marker; none where `first` itself is not replaced."""
    stop = first
    while stop in replaced and stop - first < longest:
        stop += 1
    return range(first, stop)


def collate(examples: Sequence[Example], *, vocabulary: int) -> Batch:
    """Pads examples on the right and turns their lists into tensors."""
    length = max(len(example.ids) for example in examples)
    ids_BT = torch.zeros(len(examples), length, dtype=torch.long)
    learned_BT = torch.zeros(len(examples), length, dtype=torch.bool)
    soft_index, soft_tokens, bag_index, bags = [], [], [], []
    for row, example in enumerate(examples):
        ids_BT[row, : len(example.ids)] = torch.tensor(example.ids).clamp(min=0)
        learned_BT[row, : len(example.ids)] = torch.tensor(example.learned)
        soft_index += [(row, position) for position, token in enumerate(example.ids) if token == SOFT]
        soft_tokens += example.soft
        bag_index += [(row, position) for position, _ in example.bags]
        bags += [bag for _, bag in example.bags]
    return Batch(
        ids_BT=ids_BT,
        learned_BT=learned_BT,
        soft_index_2N=torch.tensor(soft_index, dtype=torch.long).reshape(-1, 2).T,
        soft_weights_NV=_rows(map(_uniform, soft_tokens), vocabulary),
        bag_index_2M=torch.tensor(bag_index, dtype=torch.long).reshape(-1, 2).T,
        bag_targets_MV=_rows(bags, vocabulary),
        tokens=sum(len(example.ids) for example in examples),
    )


def _append(example: Example, ids: Sequence[int], *, learned: bool) -> None:
    example.ids += ids
    example.learned += [learned] * len(ids)


def _uniform(tokens: Sequence[int]) -> dict[int, float]:
    return {token: tokens.count(token) / len(tokens) for token in tokens}


def _rows(shares: Iterable[dict[int, float]], vocabulary: int) -> Tensor:
    """[N, V]: a row for each {token id: share}."""
    rows = list(shares)
    shares_NV = torch.zeros(len(rows), vocabulary)
    for row, of_row in enumerate(rows):
        shares_NV[row, list(of_row)] = torch.tensor(list(of_row.values()))
    return shares_NV
