"""Small tokenizers of each family, trained on the spot on text that is full of markers.

The training text has punctuation, newlines and spaces next to the tags, so that the learned tokens
cross the tags' borders (`.<`, `>\\n`), as they do in real vocabularies.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, SentencePieceBackend
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

from lrscale.latent.marker import CLOSE_TAG, OPEN_TAG
from lrscale.latent.vocabulary import byte_level_alphabet

EOS = "</s>"


def training_text(lines: int = 300) -> list[str]:
    """Lines of words, numbers and markers, the tags next to all sorts of characters."""
    rng = random.Random(0)
    words = ["the", "thought", "implicit", "cat", "was", "in", "Rome", "(so", "a<b", "x>y", "</i>", "größer", "7", "42"]
    joints = [".", ". ", ".\n", "\n", " ", "", ")", ",", "<", ">"]
    text = []
    for _ in range(lines):
        parts = []
        for _ in range(6):
            marker = f"{OPEN_TAG}{rng.randint(0, 130)}{CLOSE_TAG}"
            parts += [rng.choice(words), rng.choice(joints), rng.choice([marker, marker, ""]), rng.choice(joints)]
        text.append("".join(parts))
    return text


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """GPT-2's way, with a pre-tokenizer that lets punctuation run together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        training_text(), trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


@cache
def sentencepiece_model(kind: str) -> bytes:
    """A trained SentencePiece model of the kind `unigram` or `bpe`, with byte pieces, that keeps all white space."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()),
        model_writer=model,
        model_type=kind,
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def sentencepiece_slow(kind: str) -> PreTrainedTokenizerBase:
    """transformers' tokenizer over the SentencePiece library itself."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(sentencepiece_model(kind))
        return SentencePieceBackend(vocab_file=str(path), unk_token="<unk>", eos_token=EOS, legacy=True)


def sentencepiece_fast(kind: str) -> PreTrainedTokenizerFast:
    """The same model as Llama's tokenizer.json holds one: byte fallback, a leading space, one fused text."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(sentencepiece_model(kind))
        vocabulary, scores, merges = SentencePieceExtractor(str(path)).extract()
    if kind == "bpe":
        model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    else:
        model = models.Unigram(scores, unk_id=vocabulary["<unk>"], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>")


def metaspace_unigram() -> PreTrainedTokenizerFast:
    """T5's way: a Metaspace on both sides, no byte pieces (what is not in the vocabulary is unknown)."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", EOS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>")


BUILDERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte_level_bpe": byte_level_bpe,
    "unigram": lambda: sentencepiece_fast("unigram"),
    "sentencepiece_bpe": lambda: sentencepiece_fast("bpe"),
    "unigram_slow": lambda: sentencepiece_slow("unigram"),
    "metaspace_unigram": metaspace_unigram,
}
NAMES = [f"{name}-{tags}" for name in BUILDERS for tags in ("plain", "tags")]


@cache
def tokenizer_named(name: str) -> PreTrainedTokenizerBase:
    """One of NAMES; those in `-tags` have both tags as added special tokens."""
    family, tags = name.split("-")
    tokenizer = BUILDERS[family]()
    if tags == "tags":
        tokenizer.add_tokens([OPEN_TAG, CLOSE_TAG], special_tokens=True)
    return tokenizer


def tokenizer_of(tokens: Sequence[bytes], eos: str | None = EOS) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose token i stands for the bytes tokens[i]; `eos` is the id behind them."""
    character = {byte: char for char, byte in byte_level_alphabet().items()}
    vocabulary = {"".join(character[byte] for byte in token): i for i, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
