"""The tokenizer of the tiny base model: SentencePiece over ring stories and their traces, packaged for transformers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lrscale.config.task import FlawedStoriesConfig
from lrscale.tasks.flawed_stories import FlawedStories
from lrscale.tasks.prompting import MARKER_EXAMPLE

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
TAGS = ("<implicit_thought>", "</implicit_thought>")
"""Added special tokens; the number between them is written in ordinary digit tokens."""

_PIECES = 254  # 256 with the two tags: enough for every word of the task to be whole
_CORPUS_STORIES = 2000
# All of printable ASCII, so that any English text has tokens, if only one a character.
_CHARACTERS = "".join(chr(code) for code in range(33, 127))
# One token each wherever they stand: the line break, and what opens an answer.
_SYMBOLS = ["\n", "\\boxed{"]


def train_sentencepiece(task: FlawedStories) -> bytes:
    """A serialised SentencePiece BPE model; `task` draws the corpus."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(task),
        model_writer=model,
        model_type="bpe",
        vocab_size=_PIECES,
        required_chars=_CHARACTERS,
        user_defined_symbols=_SYMBOLS,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        # `3.` may be one piece; the digits alone are pieces as well, being required characters.
        split_by_number=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        pad_piece=PAD,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def package(sentencepiece_model: bytes) -> PreTrainedTokenizerFast:
    """The same tokenizer for transformers, with the two tags added; gives the ids that SentencePiece gives."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(pieces, vocab), unk_token=UNK, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.add_special_tokens(
        [AddedToken(tag, special=True, normalized=False) for tag in (UNK, BOS, EOS, PAD, *TAGS)]
    )
    tokenizer.add_tokens([AddedToken(symbol, special=False, normalized=False) for symbol in _SYMBOLS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, pieces.bos_id())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(TAGS),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path, task: FlawedStories) -> PreTrainedTokenizerFast:
    """Trains, writes tokenizer.json and tokenizer.model into `folder`, and returns the tokenizer."""
    model = train_sentencepiece(task)
    tokenizer = package(model)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model)
    return tokenizer


def _merges(pieces: sentencepiece.SentencePieceProcessor, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges behind a BPE model: every pair of pieces that makes a third, best piece first."""
    learned = sorted((p for p in vocab if len(p) > 1 and p not in _SYMBOLS), key=lambda p: -pieces.get_score(vocab[p]))
    return [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]


def _corpus(task: FlawedStories) -> Iterator[str]:
    for index in range(_CORPUS_STORIES):
        prompt = task.prompt("train", index, markers=True).text
        # The tags are added tokens: SentencePiece sees what stands around them.
        yield from prompt.split(MARKER_EXAMPLE)
        yield task.reference_trace(index)
    # The letter that stands for the number in prompts, and the numbers themselves, as they come between the tags.
    yield from ["n", *"0123456789"] * 50


def ring_task(seed: int) -> FlawedStories:
    """The task that the tiny base is made for: ring stories of 4 to 8 events, brief prompts."""
    return FlawedStories(FlawedStoriesConfig(world="ring", events=(4, 8), prompt_style="brief"), seed=seed)
