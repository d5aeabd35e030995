"""What bytes a token id stands for, against each tokenizer's own way of decoding."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lrscale.latent.marker import CLOSE_TAG, OPEN_TAG
from lrscale.latent.vocabulary import byte_level_alphabet, vocabulary_bytes
from tests.unit.latent.trained_tokenizers import EOS, NAMES, tokenizer_named, training_text


def word_level(tokens: list[str], decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_join_to_the_decoded_text(name: str) -> None:
    """Locks out a wrong alphabet, lost byte pieces and lost spaces: joined bytes are what decode() gives."""
    tokenizer = tokenizer_named(name)
    table = vocabulary_bytes(tokenizer, readable=(OPEN_TAG, CLOSE_TAG))
    assert len(table) == len(tokenizer)
    texts = training_text(20)
    if not name.startswith("metaspace"):  # it has no byte pieces: what it has not seen is unknown to it
        texts += ["tab\there", "größer 東京 🙂 <0x41>", "a  b   c"]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(table[i] or b"" for i in ids).decode()
        if name.startswith("unigram_slow"):  # decodes byte pieces as they are written
            assert joined.replace(" ", "") == text.replace(" ", "")
        else:
            decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert joined.removeprefix(" ") == decoded.removeprefix(" ")


def test_byte_level_alphabet_is_gpt2s() -> None:
    """All 256 bytes, each by one character; a space is Ġ and a newline Ċ."""
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["A"], alphabet["Ń"]) == (0x20, 0x0A, 0x41, 0xAD)


def test_special_tokens_are_opaque_and_other_added_tokens_are_text() -> None:
    """Locks out text in special tokens, and opaque tags where they are special tokens."""
    tokenizer = word_level(["<unk>", "a"], decoders.ByteLevel())
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("x y", special=False)])
    tokenizer.add_tokens([OPEN_TAG, "<pad>"], special_tokens=True)
    table = vocabulary_bytes(tokenizer, readable=(OPEN_TAG, CLOSE_TAG))
    by_token = {token: table[i] for token, i in tokenizer.get_vocab().items()}
    assert by_token == {
        **{"<unk>": b"<unk>", "a": b"a", EOS: None, "<think>": b"<think>", "x y": b"x y"},
        **{OPEN_TAG: OPEN_TAG.encode(), "<pad>": None},
    }
    assert vocabulary_bytes(tokenizer)[tokenizer.get_vocab()[OPEN_TAG]] is None


def test_holes_in_the_vocabulary_are_opaque() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a"))
    tokenizer.decoder = decoders.ByteLevel()
    assert vocabulary_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == [b"a", None, None, b"b"]


@pytest.mark.parametrize(
    ("decoder", "token", "expected"),
    [
        (decoders.ByteFallback(), "<0x3C>", b"<"),
        (decoders.ByteFallback(), "<0xe2>", b"\xe2"),
        (decoders.ByteFallback(), "<0xZZ>", b"<0xZZ>"),
        (decoders.Metaspace(), "▁a▁", b" a "),
        (decoders.ByteLevel(), "Ġé", b" \xe9"),
        (decoders.ByteLevel(), "Ġ東", "Ġ東".encode()),
        (decoders.Sequence([decoders.Sequence([decoders.Replace("_", " ")]), decoders.Fuse()]), "a_b", b"a b"),
        (None, "a", b" a"),
    ],
)
def test_decoder_steps(decoder: decoders.Decoder | None, token: str, expected: bytes) -> None:
    assert vocabulary_bytes(word_level(["<unk>", token], decoder))[1] == expected


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.Replace(Regex("a+"), "b"),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace("a", "b")]),
    ],
)
def test_unknown_decoder_is_refused(decoder: decoders.Decoder) -> None:
    """Better no detector than one that reads other bytes than the user sees."""
    with pytest.raises(ValueError, match=r"decodes with .* is not supported"):
        vocabulary_bytes(word_level(["<unk>", "a"], decoder))


def test_tokenizer_of_an_unknown_kind_is_refused() -> None:
    class Foreign:
        added_tokens_decoder: dict[int, AddedToken] = {}  # noqa: RUF012 (as the real ones have it)

    with pytest.raises(ValueError, match="Foreign"):
        vocabulary_bytes(Foreign())
