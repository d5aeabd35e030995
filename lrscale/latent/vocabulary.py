"""The bytes every token id contributes to the text, read from a tokenizer without decoding.

Decoding hides what the marker detector needs: half a UTF-8 character becomes U+FFFD,
the first token loses its space. So the tokenizer's own decoder steps are applied here
token by token, on bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import cache
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE_MARK = "▁"
"""How SentencePiece writes a space (U+2581)."""

TokenToBytes = Callable[[str], bytes]


def vocabulary_bytes(tokenizer: PreTrainedTokenizerBase, *, readable: Collection[str] = ()) -> list[bytes | None]:
    """Bytes of each token id; None for an id that stands for no text.

    None are the special tokens (all but those named in `readable`) and ids that no token has.
    Raises ValueError for a tokenizer whose way of decoding is unknown.
    """
    to_bytes = _token_to_bytes(tokenizer)
    vocabulary = tokenizer.get_vocab()
    table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    for token, token_id in vocabulary.items():
        if token_id not in special or token in readable:
            table[token_id] = to_bytes(token)
    return table


@cache
def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE: printable bytes stand for themselves, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _token_to_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenToBytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return _from_decoder(_decoder_steps(backend), type(tokenizer).__name__)
    if hasattr(tokenizer, "sp_model"):
        return lambda token: _byte_fallback(token.replace(SPACE_MARK, " "))
    raise ValueError(
        f"cannot tell which bytes the tokens of {type(tokenizer).__name__} stand for: it is neither a `tokenizers` "
        "nor a SentencePiece tokenizer; load the model's tokenizer.json (AutoTokenizer with use_fast=True)"
    )


def _decoder_steps(backend: Tokenizer) -> list[dict[str, Any]]:
    """The decoder of a `tokenizers` tokenizer as its JSON steps, nested sequences flattened."""
    if backend.decoder is None:
        return [{"type": "None"}]
    shell = Tokenizer(BPE())  # an empty model: serialising the real one would write out its whole vocabulary
    shell.decoder = backend.decoder
    return _flatten(json.loads(shell.to_str())["decoder"])


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for child in decoder["decoders"] for step in _flatten(child)]


def _from_decoder(steps: list[dict[str, Any]], owner: str) -> TokenToBytes:
    """One function for a chain of decoder steps: text rewrites first, then a step that makes bytes."""
    rewrites: list[Callable[[str], str]] = []
    to_bytes: TokenToBytes = str.encode
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            break  # what follows sees the joined text: Strip and the like touch its ends only
        if kind in ("ByteLevel", "ByteFallback"):
            to_bytes = _byte_level if kind == "ByteLevel" else _byte_fallback
            continue
        rewrite = _rewrite(step)
        if rewrite is None or to_bytes is not str.encode:
            raise ValueError(
                f"{owner} decodes with {[step['type'] for step in steps]}, and {kind} there is not supported: the "
                "bytes of a token cannot be told; use a byte-level BPE or SentencePiece tokenizer"
            )
        rewrites.append(rewrite)

    def convert(token: str) -> bytes:
        for rewrite in rewrites:
            token = rewrite(token)
        return to_bytes(token)

    return convert


def _rewrite(step: dict[str, Any]) -> Callable[[str], str] | None:
    """A step that maps the text of one token to text; None where the result hangs on the neighbours or is unknown."""
    match step:
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return lambda token: token.replace(old, new)
        case {"type": "Metaspace", "replacement": mark}:
            return lambda token: token.replace(mark, " ")
        case {"type": "None"}:  # `tokenizers` joins with spaces what has no decoder
            return lambda token: " " + token
    return None


def _byte_level(token: str) -> bytes:
    alphabet = byte_level_alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # as `tokenizers` does: one foreign character and the token is taken as text
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass
    return token.encode()
