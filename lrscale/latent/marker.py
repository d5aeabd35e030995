"""Where latent runs begin: one streaming, byte-exact marker detector over token ids.

A marker is `<implicit_thought>`, a positive number in ASCII digits (spaces around it are
tolerated: SentencePiece may put one there), `</implicit_thought>`. It is looked for in the
bytes the tokens stand for, so it does not matter how a tokenizer cuts them up, nor what stands
before or behind. Special tokens other than the tags stand for no text and end a match.

The bytes are read by a small automaton with states (m = max_latent_steps)

    opened(k)     k bytes of the opening tag are matched, 0 <= k <= 18; at 18 spaces may follow
    number(v)     digits read so far are worth v (at most m)
    spaced(v)     spaces behind the digits
    closing(v, k) k bytes of the closing tag are matched, 1 <= k <= 18

and the effect of a whole token on every state is one row of a dense table, so that a step of
decoding is one gather for all rows of a batch. Few tokens differ in their effect (most of them
just lead back to opened(0)), hence the table has a row a class of tokens, not a row a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lrscale.latent.vocabulary import vocabulary_bytes
from lrscale.records import LatentSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN_TAG = "<implicit_thought>"
CLOSE_TAG = "</implicit_thought>"
MAX_LATENT_STEPS_LIMIT = 256
"""The table grows with max_latent_steps (20 states each): beyond this it would take tens of MB."""

_OPEN, _CLOSE = OPEN_TAG.encode(), CLOSE_TAG.encode()
_STATE_BITS = 16
_STATE_MASK = (1 << _STATE_BITS) - 1


class MarkerDetector:
    """Finds markers in token ids, one at a time, a batch at a time, or in a recorded sequence.

    A marker's latent run follows the token that holds its last byte `>`; the rest of that token is
    read on, so adjacent markers and tokens such as `><` are exact. Where one token completes several
    markers, the last of them counts. A number that is 0 makes the whole thing plain text; a number above
    `max_latent_steps` counts as `max_latent_steps`. Ids the tokenizer does not know are read as special tokens.
    """

    initial_state: int = 0

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_latent_steps: int = 32) -> None:
        if not 1 <= max_latent_steps <= MAX_LATENT_STEPS_LIMIT:
            raise ValueError(f"max_latent_steps is {max_latent_steps}; it must be from 1 to {MAX_LATENT_STEPS_LIMIT}")
        self.tokenizer = tokenizer
        self.max_latent_steps = max_latent_steps
        self._bytes = vocabulary_bytes(tokenizer, readable=(OPEN_TAG, CLOSE_TAG))
        vocabulary = tokenizer.get_vocab()
        self._tag_ids = (vocabulary.get(OPEN_TAG), vocabulary.get(CLOSE_TAG))
        class_of_V, self._table_CS = _token_classes(self._bytes, _byte_transitions(max_latent_steps))
        # Entry 0 is for ids below 0, the last one for ids beyond the vocabulary: both opaque, which is class 0.
        self._row_of_id = np.concatenate([[0], class_of_V, [0]]).astype(np.int64) * self._table_CS.shape[1]
        # What a token does in state 0: where that is nothing, a scan outside of a tag may step over it.
        self._starts_of_id = self._table_CS.ravel()[self._row_of_id] != 0
        self._rows = array("q", self._row_of_id.tobytes())  # plain Python reads these faster than numpy arrays
        self._cells = array("i", self._table_CS.tobytes())
        self._device_tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._marker_ids: dict[int, tuple[int, ...]] = {}

    @property
    def has_marker_tokens(self) -> bool:
        """Whether each of the two tags is a token of its own."""
        return None not in self._tag_ids

    def token_bytes(self, token_id: int) -> bytes:
        """What the token contributes to the text; nothing for special tokens (but the tags) and unknown ids."""
        return b"" if self.is_opaque(token_id) else self._bytes[token_id] or b""

    def is_opaque(self, token_id: int) -> bool:
        """Whether the id stands for no text, and so ends any match that is under way."""
        return not 0 <= token_id < len(self._bytes) or self._bytes[token_id] is None

    def advance(self, states_B: Tensor, token_ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """Read one more token a row: the new states, and the latent steps that follow it (0: no marker ended).

        Any shape, any device, int64 in and out; no data-dependent control flow. The first call on a device
        copies the tables there, so make one before a CUDA graph is captured.
        """
        row_of_id, cells = self._tables_on(token_ids_B.device)
        rows_B = row_of_id[token_ids_B.clamp(-1, len(self._bytes)) + 1]
        packed_B = cells[rows_B + states_B].long()
        return packed_B & _STATE_MASK, packed_B >> _STATE_BITS

    def advance_one(self, state: int, token_id: int) -> tuple[int, int]:
        """`advance` for a single row, without tensors."""
        row = self._rows[min(max(token_id, -1), len(self._bytes)) + 1]
        packed = self._cells[row + state]
        return packed & _STATE_MASK, packed >> _STATE_BITS

    def follow(
        self, states_B: Tensor, remaining_B: Tensor, token_ids_B: Tensor, latent_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read one more position a row, a token or (where `latent_B`) a latent step: the new states, and the latent
        steps that follow now.

        A latent step counts its run down and leaves the state alone, its token id is not looked at. A token drops
        what remained of a run and may begin one. Shapes and devices as in `advance`.
        """
        read_B, steps_B = self.advance(states_B, token_ids_B)
        states_B = torch.where(latent_B, states_B, read_B)
        return states_B, torch.where(latent_B, (remaining_B - 1).clamp(min=0), steps_B)

    def may_begin(self, token_ids_N: np.ndarray) -> np.ndarray:
        """Which ids do anything in the initial state; a scan outside of a marker may step over all others."""
        return self._starts_of_id[np.clip(token_ids_N, -1, len(self._bytes)) + 1]

    def find(self, token_ids: Sequence[int]) -> list[LatentSpan]:
        """The markers of one sequence, in order; a span's position is the index of the marker's last token."""
        positions, steps = self._scan(np.asarray(token_ids, dtype=np.int64).reshape(-1))
        return list(map(LatentSpan, positions, steps))

    def find_batch(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> list[list[LatentSpan]]:
        """`find` for each row of a padded batch.

        Positions count the row's real tokens only (mask 1), so left and right padding give the same spans.
        """
        if input_ids_BT.ndim != 2 or input_ids_BT.shape != attention_mask_BT.shape:
            raise ValueError(
                f"input_ids_BT has the shape {tuple(input_ids_BT.shape)} and attention_mask_BT "
                f"{tuple(attention_mask_BT.shape)}; both must be the same [B, T]"
            )
        real_BT = attention_mask_BT.detach().cpu().numpy() != 0
        lengths_B = real_BT.sum(axis=1)
        # All rows in one line with an opaque id behind each, so that no match runs from a row into the next.
        row_starts_B = np.concatenate([[0], np.cumsum(lengths_B + 1)[:-1]]) if len(lengths_B) else lengths_B
        line = np.full(lengths_B.sum() + len(lengths_B), -1, dtype=np.int64)
        is_token = np.ones(len(line), dtype=bool)
        is_token[row_starts_B + lengths_B] = False
        line[is_token] = input_ids_BT.detach().cpu().numpy()[real_BT]
        positions, steps = self._scan(line)
        rows = np.searchsorted(row_starts_B, positions, side="right") - 1
        spans: list[list[LatentSpan]] = [[] for _ in lengths_B]
        for row, position, count in zip(rows.tolist(), positions, steps, strict=True):
            spans[row].append(LatentSpan(position - int(row_starts_B[row]), count))
        return spans

    def marker_ids(self, n: int) -> tuple[int, ...]:
        """Token ids of the marker with the number n >= 1: the tags as tokens where there are such, digits as usual.

        Raises ValueError where this tokenizer cannot write the marker so that it is found again.
        """
        if n not in self._marker_ids:
            if n < 1:
                raise ValueError(f"a marker's number is {n}; it must be 1 or more")
            self._marker_ids[n] = self._write_marker(n)
        return self._marker_ids[n]

    def _write_marker(self, n: int) -> tuple[int, ...]:
        text = f"{OPEN_TAG}{n}{CLOSE_TAG}"
        encoded = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        leading = 0  # SentencePiece may put a token for a space in front
        while leading < len(encoded) and self.token_bytes(encoded[leading]) == b" ":
            leading += 1
        candidates = [encoded[leading:]]
        open_id, close_id = self._tag_ids
        if open_id is not None and close_id is not None:
            digits = [self._bytes.index(digit.encode()) for digit in str(n) if digit.encode() in self._bytes]
            candidates.append((open_id, *digits, close_id))
        expected = min(n, self.max_latent_steps)
        exact = [ids for ids in candidates if self.find(ids) == [LatentSpan(len(ids) - 1, expected)]]
        if not exact:
            read = b"".join(map(self.token_bytes, encoded)).decode(errors="replace")
            raise ValueError(
                f"{type(self.tokenizer).__name__} cannot write the marker {text!r}: encoded, it reads {read!r}. Add "
                f"the tags as tokens, tokenizer.add_tokens({[OPEN_TAG, CLOSE_TAG]}, special_tokens=True), and resize "
                "the model's embeddings; the ten digits must be in the vocabulary"
            )
        return min(exact, key=lambda ids: sum(len(self.token_bytes(i)) for i in ids))  # without spaces, if one is

    def _scan(self, ids_N: np.ndarray) -> tuple[list[int], list[int]]:
        """Positions and steps of the markers in a line of ids.

        Steps token by token only while a match is under way; all else is skipped at once.
        """
        row_index_N = np.clip(ids_N, -1, len(self._bytes)) + 1
        rows_N = self._row_of_id[row_index_N].tolist()
        positions, steps = [], []
        end = 0
        for start in np.flatnonzero(self._starts_of_id[row_index_N]).tolist():
            if start < end:
                continue
            state, end = 0, start
            while end < len(rows_N) and (state or end == start):
                packed = self._cells[rows_N[end] + state]
                state = packed & _STATE_MASK
                if packed > _STATE_MASK:
                    positions.append(end)
                    steps.append(packed >> _STATE_BITS)
                end += 1
        return positions, steps

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._device_tables:
            row_of_id = torch.from_numpy(self._row_of_id).to(device)
            cells = torch.from_numpy(self._table_CS.ravel()).to(device)
            self._device_tables[device] = (row_of_id, cells)
        return self._device_tables[device]


def _byte_transitions(max_steps: int) -> np.ndarray:
    """[256, S] int32: where each byte leads from each state, with the steps of a marker it completes above bit 16."""
    alphabet = sorted({*_OPEN, *_CLOSE, *b"0123456789 "})
    state_count = len(_OPEN) + 1 + (max_steps + 1) * (len(_CLOSE) + 1)
    transitions = np.zeros((256, state_count), dtype=np.int32)
    for byte in alphabet:
        transitions[byte] = [_next_state(state, byte, max_steps) for state in range(state_count)]
    return transitions


def _next_state(state: int, byte: int, max_steps: int) -> int:
    """One step of the automaton on one byte, packed.

    A failed match can only go on inside itself where it ends in `<`, for no tag holds a second one:
    that is the restart below, and `<i` where the `<` was taken for the closing tag's.
    """
    values, opened_all = max_steps + 1, len(_OPEN)
    restart = 1 if byte == _OPEN[0] else 0
    number, spaced, closing = opened_all + 1, opened_all + 1 + values, opened_all + 1 + 2 * values
    if state < opened_all:
        return state + 1 if byte == _OPEN[state] else restart
    digit = byte - ord("0") if ord("0") <= byte <= ord("9") else None
    if state == opened_all:
        if digit is not None:
            return number + min(digit, max_steps)
        return state if byte == ord(" ") else restart
    if state < closing:
        value = (state - number) % values
        if digit is not None and state < spaced:
            return number + min(10 * value + digit, max_steps)
        if byte == ord(" "):
            return spaced + value
        return closing + value * (len(_CLOSE) - 1) if byte == _CLOSE[0] else restart
    value, matched = divmod(state - closing, len(_CLOSE) - 1)
    matched += 1
    if byte != _CLOSE[matched]:
        return 2 if matched == 1 and byte == _OPEN[1] else restart
    return state + 1 if matched + 1 < len(_CLOSE) else value << _STATE_BITS


def _token_classes(tokens: Iterable[bytes | None], transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fold the bytes of each token over the automaton: (class of each token [V], packed table [C, S] int32).

    What a byte string does to all states is an array; there are few different ones, so each is kept once and
    the way from one by one byte to the next is remembered. Class 0 is that of opaque tokens: all states to 0.
    """
    identity = np.arange(transitions.shape[1], dtype=np.int32)
    effects = [np.zeros_like(identity), identity]
    index_of = {effect.tobytes(): i for i, effect in enumerate(effects)}
    after: dict[int, int] = {}  # effect * 256 + byte -> effect

    def extend(effect: int, byte: int) -> int:
        before = effects[effect]
        packed = transitions[byte][before & _STATE_MASK]
        result = np.where(packed > _STATE_MASK, packed, packed | (before & ~_STATE_MASK))
        index = index_of.setdefault(result.tobytes(), len(effects))
        if index == len(effects):
            effects.append(result)
        return index

    effect_of_V = []
    for token in tokens:
        effect = 0 if token is None else 1
        for byte in token or b"":
            key = effect << 8 | byte
            if key not in after:
                after[key] = extend(effect, byte)
            effect = after[key]
        effect_of_V.append(effect)
    used, class_of_V = np.unique([0, *effect_of_V], return_inverse=True)
    return class_of_V[1:], np.stack([effects[i] for i in used])
