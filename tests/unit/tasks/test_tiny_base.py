"""The shipped tiny base, its tokenizer, and the script that makes both."""

from __future__ import annotations

import hashlib
import itertools
from importlib.resources import files
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from lrscale.tasks.prompting import BRIEF_MARKER_SENTENCE, MARKER_EXAMPLE
from lrscale.tasks.ring import NAMES, PLACES, STEPS
from lrscale.tasks.tiny_base.examples import SOFT, Examples, collate
from lrscale.tasks.tiny_base.make import make_tiny_base
from lrscale.tasks.tiny_base.measure import accuracy, completions, direct_accuracy
from lrscale.tasks.tiny_base.muon import Muon
from lrscale.tasks.tiny_base.tokenizer import TAGS, ring_task, train_sentencepiece
from lrscale.tasks.tiny_base.training import TrainingSettings, batch_loss, build_model, input_embeddings

SHIPPED = Path(str(files("lrscale.tasks") / "assets" / "tiny_base"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(SHIPPED, local_files_only=True)


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Locks out a pad that equals eos, tags in pieces, and numbers of markers that are no ordinary digits."""
    specials = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert None not in specials and len(set(specials)) == 4
    for number in ("2", "10", "37"):
        ids = tokenizer(f"{TAGS[0]}{number}{TAGS[1]}", add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == [TAGS[0], *number, TAGS[1]]
    assert set(tokenizer.convert_tokens_to_ids(list(TAGS))) <= set(tokenizer.all_special_ids)
    assert tokenizer("Anna")["input_ids"][0] == tokenizer.bos_token_id


def test_stories_and_traces_survive_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Locks out unknown tokens, text that changes on the way, and a .model that disagrees with tokenizer.json."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED / "tokenizer.model"))
    task = ring_task(4)
    for index in range(500):
        prompt = task.prompt("eval", index, markers=True).text
        trace = task.reference_trace(index, "eval")
        for text in (prompt, trace, f"{prompt} {trace}", f"fine.{TAGS[0]}2{TAGS[1]} 4. {trace}\n{TAGS[0]}1{TAGS[1]}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        for text in (prompt.split(MARKER_EXAMPLE)[0], trace):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_any_ascii_text_has_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Locks out a prompt in other English words turning into unknown tokens."""
    text = "".join(chr(code) for code in range(33, 127)) + " Who lives in the Q-house? <b>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_words_of_the_task_are_whole_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Locks out a longer demo because words fall to pieces (every token costs CPU)."""
    words = [*NAMES, *PLACES, *STEPS, "goes", "takes", "sweeps", "starts", "now", "fine", "conflict", "the", "on", "at"]
    vocabulary = tokenizer.get_vocab()
    assert [word for word in words if f"▁{word}" not in vocabulary] == []
    task = ring_task(0)
    sentences = [sentence for index in range(200) for sentence in task.story("train", index).trace]
    # Ten tokens a sentence: with the paper's ratio of 0.2 every replaced sentence becomes a marker of 2 steps.
    assert {len(tokenizer(sentence, add_special_tokens=False)["input_ids"]) for sentence in sentences} == {10}
    lengths = [len(tokenizer(task.prompt("train", i, markers=True).text)["input_ids"]) for i in range(200)]
    assert max(lengths) <= 90


def test_shipped_model_is_small_float32_and_reasons_better_than_it_guesses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Locks out a shipped model that was made for another tokenizer or task, is at chance, or leaves no room to RL."""
    assert (SHIPPED / "model.safetensors").stat().st_size < 5 * 2**20
    assert model.dtype == torch.float32 and model.config.vocab_size == len(tokenizer)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    task = ring_task(0)
    prompts = [task.prompt("eval", index, markers=False) for index in range(96)]
    explicit = accuracy(task, prompts, completions(model, tokenizer, prompts))
    direct = direct_accuracy(model, tokenizer, prompts)
    # 96 stories: one standard error is 0.045. The script's own figures, on 1,000 stories, are in made.json.
    assert 0.55 < explicit < 0.9 and 0.35 < direct < 0.65, (explicit, direct)


def test_shipped_model_writes_markers_only_when_told_of_them(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Locks out a base that does not know the marker, or writes it in the discrete arm."""
    task = ring_task(0)
    texts = {}
    for markers in (False, True):
        prompts = [task.prompt("eval", index, markers=markers) for index in range(32)]
        texts[markers] = completions(model, tokenizer, prompts)
    assert sum(TAGS[0] in text for text in texts[False]) <= 1
    assert sum(f"{TAGS[0]}2{TAGS[1]}" in text for text in texts[True]) >= 24


def test_examples_put_soft_inputs_behind_markers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Locks out a base that learns to go on behind an empty marker, or soft inputs that do not hold the sentence."""
    task = ring_task(0)
    examples = Examples(task, tokenizer, soft_share=1.0, slip_share=0.0, seed=0)
    opening, closing = tokenizer.convert_tokens_to_ids(list(TAGS))
    runs = set()
    for index in range(50):
        example = examples.draw()
        trace = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in task.story("train", index).trace]
        soft, bags, written = iter(example.soft), iter(example.bags), []
        place = example.learned.index(True)
        while example.ids[place] != tokenizer.eos_token_id:
            if example.ids[place] != opening:
                written.append(example.ids[place])
                place += 1
                continue
            digits, place = place + 1, example.ids.index(closing, place) + 1
            steps = int(tokenizer.decode(example.ids[digits : place - 1]))
            runs.add(steps)
            assert example.ids[place : place + steps] == [SOFT] * steps
            assert example.learned[digits - 1 : place + steps] == [True] * (place - digits + 1) + [False] * steps
            for latent in range(place, place + steps):
                piece = next(soft)
                position, bag = next(bags)
                assert position == latent - 1
                assert bag.keys() == set(piece) and abs(sum(bag.values()) - 1.0) < 1e-9
                written += piece
            place += steps
        answer = tokenizer(rf" \boxed{{{task.story('train', index).answer}}}", add_special_tokens=False)["input_ids"]
        assert written == [*itertools.chain(*trace), *answer]
        assert next(soft, None) is None
    assert {2, 8} <= runs  # one sentence, and four of them


def test_bags_weigh_what_has_to_be_worked_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Locks out a base that can read soft inputs and not compute on them: the place was lost among copied words."""
    examples = Examples(ring_task(0), tokenizer, soft_share=1.0, slip_share=0.0, seed=0)
    example = examples.draw()
    places = set(tokenizer.convert_tokens_to_ids([f"▁{place}" for place in PLACES]))
    verdicts = set(tokenizer.convert_tokens_to_ids(["▁fine", "▁conflict"]))
    second_halves = [bag for (_, bag), piece in zip(example.bags, example.soft, strict=True) if verdicts & set(piece)]
    assert second_halves
    for bag in second_halves:
        assert sum(share for token, share in bag.items() if token in places | verdicts) > 0.8
        assert min(share for token, share in bag.items() if token in verdicts) > 0.4


def test_muon_steps_as_torch_does() -> None:
    """Locks out a rule of our own: torch's Muon, whose matrices it takes one by one in bfloat16."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (24, 8), (8, 24))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = ours[0].detach().clone()
    steps = [
        Muon(ours, lr=0.02, weight_decay=0.05),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.05, adjust_lr_fn="original"),
    ]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in steps:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        # bfloat16 in torch's: three significant digits of an update of size 0.02
        assert torch.allclose(mine, other, atol=2e-3)
    assert (ours[0] - start).abs().max() > 0.02  # ten times what the two may differ by


def test_explicit_examples_are_prompt_and_reference_trace(tokenizer: PreTrainedTokenizerBase) -> None:
    """Locks out training on text that the tokenizer would cut differently, or loss on the prompt."""
    task = ring_task(0)
    examples = Examples(task, tokenizer, soft_share=0.0, slip_share=0.0, seed=0)
    for index in range(20):
        example = examples.draw()
        prompt = task.prompt("train", index, markers=False).text
        whole = tokenizer(f"{prompt} {task.reference_trace(index)}")["input_ids"]
        assert example.ids == [*whole, tokenizer.eos_token_id]
        assert example.learned.index(True) == len(tokenizer(prompt)["input_ids"])
        assert BRIEF_MARKER_SENTENCE not in tokenizer.decode(example.ids)


def test_batch_loss_is_that_of_a_plain_loop(tokenizer: PreTrainedTokenizerBase) -> None:
    """Locks out targets off by one, padding that counts, and soft inputs in the wrong place or row."""
    model = build_model(tokenizer, seed=0).double()
    examples = Examples(ring_task(0), tokenizer, soft_share=0.5, slip_share=0.1, seed=1)
    drawn = [examples.draw() for _ in range(5)]
    assert any(example.soft for example in drawn) and not all(example.soft for example in drawn)
    batch = collate(drawn, vocabulary=len(tokenizer))
    batch.soft_weights_NV.data = batch.soft_weights_NV.double()
    batch.bag_targets_MV.data = batch.bag_targets_MV.double()
    weight = model.get_input_embeddings().weight
    learned_loss, bag_loss, count = 0.0, 0.0, 0
    for row, example in enumerate(drawn):
        soft = iter(example.soft)
        inputs = torch.stack([weight[next(soft)].mean(0) if token == SOFT else weight[token] for token in example.ids])
        assert torch.allclose(input_embeddings(model, batch)[row, : len(inputs)], inputs)
        logprobs = F.log_softmax(model(inputs_embeds=inputs[None]).logits[0].float(), dim=-1)
        for position, learned in enumerate(example.learned):
            if learned:
                learned_loss -= logprobs[position - 1, example.ids[position]].item()
                count += 1
        for position, bag in example.bags:
            bag_loss -= sum(share * logprobs[position, token].item() for token, share in bag.items())
    assert batch_loss(model, batch).item() == pytest.approx((learned_loss + bag_loss) / count, rel=1e-5)


def test_tokenizer_is_the_shipped_one_again() -> None:
    """Locks out a shipped tokenizer that the script and its stories no longer make."""
    assert train_sentencepiece(ring_task(0)) == (SHIPPED / "tokenizer.model").read_bytes()


@pytest.mark.slow
def test_a_seed_gives_the_same_bits_again(tmp_path: Path) -> None:
    """Locks out a base that nobody can make a second time."""
    digests = []
    for name in ("one", "two"):
        make_tiny_base(tmp_path / name, TrainingSettings(seed=5, steps=3), eval_stories=4, report=lambda line: None)
        digests.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
