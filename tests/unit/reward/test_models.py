"""Reward models and VR-CLI against the plainest computation in float64, through real workers."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

import lrscale.tasks
from lrscale.config.reward import ModelRewardConfig, PoolConfig, VrCliRewardConfig
from lrscale.records import Prompt, Rollout, Score, ScoreFailed
from lrscale.reward.build import Surroundings, build_scorer, fingerprint
from lrscale.reward.models import ClassifierSpec, ModelPlace
from lrscale.reward.source import Sample
from lrscale.reward.vr_cli import VrCliSpec

TINY = Path(lrscale.tasks.__file__).parent / "assets" / "tiny_base"
FAIRY_TALES = Path(__file__).parents[4] / "shared" / "data" / "fairytale_sections.jsonl"
FOX = (
    "A fox lived by the mill. One day he found a key in the grass.",
    "He tried the key on every door of the village, and no door opened.",
    "At the last house an old woman laughed and showed him a chest.",
)
REASONING = "The key fits no door, so somebody will show him a chest.", "A storm comes and everybody sails away.", ""


def rollout() -> Rollout:
    return Rollout((1,), (2, 3), torch.zeros(2), (), torch.zeros(0, 4), 0, "stop")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that reads any text: the tokenizer of the shipped base, long positions."""
    folder = tmp_path_factory.mktemp("generator")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16384,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # far from uniform, or every perplexity is the size of the vocabulary
        model.lm_head.weight *= 30
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_reward(generator: Path, story: str, gold: str, reasoning: str) -> float:
    """Token by token, in float64."""
    model = AutoModelForCausalLM.from_pretrained(generator, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(generator)

    def perplexity(context: str) -> float:
        before = tokenizer(context)["input_ids"]
        after = tokenizer(gold, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0]
        total = 0.0
        for offset, token in enumerate(after):
            row = logits[len(before) + offset - 1].tolist()
            top = max(row)
            total += row[token] - top - math.log(sum(math.exp(value - top) for value in row))
        return math.exp(-total / len(after))

    base = perplexity(f"{story}\n\n")
    found = perplexity(f"{story}\n\nWhat comes next:\n{reasoning}\n\n") if reasoning else base
    return 100.0 * (base - found) / base


def vr_cli_scores(generator: Path, folder: Path, samples: list[tuple[str, str, str]]) -> list[Any]:
    reward = VrCliRewardConfig(kind="vr_cli", path=str(generator), threads=1, timeout_s=300)
    with closing(build_scorer(reward, None, Surroundings(folder))) as scorer:
        for index, (story, gold, completion) in enumerate(samples):
            columns = {"story_so_far": story, "next_chapter": gold}
            scorer.submit(index, Prompt(f"p{index}", "Foresee.", columns), rollout(), completion)
        while not scorer.wait(60):
            pass
        return list(scorer.drain().values())


def test_vr_cli_equals_a_plain_float64_computation(generator: Path, tmp_path: Path) -> None:
    """And reasoning with markers reads as without them; none at all is worth nothing."""
    story, gold = f"{FOX[0]}\n\n{FOX[1]}", FOX[2]
    marked = f"<implicit_thought>3</implicit_thought>{REASONING[0]}"
    found = vr_cli_scores(generator, tmp_path, [(story, gold, text) for text in (*REASONING, marked)])
    assert all(isinstance(score, Score) for score in found), found
    for score, reasoning in zip(found, REASONING, strict=False):
        assert score.value == pytest.approx(plain_reward(generator, story, gold, reasoning), abs=2e-3)
    assert found[3].value == found[0].value and found[2].value == 0.0
    assert abs(found[0].value) > 0.1 and found[0].value != found[1].value, "the control: reasonings make a difference"
    parts = found[0].parts
    assert parts["task"] == pytest.approx(100 * (1 - parts["perplexity_with"] / parts["perplexity_base"]))


def in_process(generator: Path, cache: Path, samples: list[tuple[str, str, str]], max_tokens: int = 8192) -> list[Any]:
    """A worker's source without the worker."""
    source = VrCliSpec(ModelPlace(str(generator), threads=1), max_tokens, str(cache)).open()
    columns = [{"story_so_far": story, "next_chapter": gold} for story, gold, _ in samples]
    texts = [text for _, _, text in samples]
    return source.score([Sample(Prompt("p", "?", own), text, ()) for own, text in zip(columns, texts, strict=True)])


def test_base_perplexities_are_computed_once_and_read_from_disk(generator: Path, tmp_path: Path) -> None:
    """Sixteen samples a prompt, thirty epochs: the base would be computed 480 times."""
    samples = [(FOX[0], FOX[1], text) for text in REASONING] + [(FOX[1], FOX[2], "x")]
    first = in_process(generator, tmp_path, samples)
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == 2
    for file in files:  # the control: what is on disk is what counts
        file.write_text(json.dumps({"perplexity": 2.0 * json.loads(file.read_text())["perplexity"]}))
    again = in_process(generator, tmp_path, samples)
    for one, two in zip(first, again, strict=True):
        assert two.parts["perplexity_base"] == 2.0 * one.parts["perplexity_base"]
    files[0].write_text("{")
    assert isinstance(in_process(generator, tmp_path, samples)[0], Score), "a damaged file is computed anew"


def test_what_does_not_fit_the_generator_is_invalid_never_cut(generator: Path, tmp_path: Path) -> None:
    """A continuation that was cut has another perplexity, and nobody would see."""
    (score,) = in_process(generator, tmp_path, [(FOX[0], FOX[1], "x")], max_tokens=20)
    assert isinstance(score, ScoreFailed) and score.kind == "invalid" and "reward.max_tokens allows 20" in score.detail


@pytest.mark.skipif(
    not FAIRY_TALES.is_file(), reason=f"needs {FAIRY_TALES.name} beside the checkout, in ../shared/data"
)
def test_vr_cli_on_fairy_tales(generator: Path, tmp_path: Path) -> None:
    """Real chapters: long, with quotation marks and dashes that a tokenizer splits in its own ways."""
    with FAIRY_TALES.open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(4)]
    samples = [
        (
            "\n\n".join(row["text"] for row in rows[:k]),
            rows[k]["text"],
            rows[k]["text"][:200].strip() if k % 2 else "All is well.",
        )
        for k in (1, 2, 3)
    ]
    found = vr_cli_scores(generator, tmp_path, samples)
    for score, (story, gold, reasoning) in zip(found, samples, strict=True):
        assert isinstance(score, Score), score
        assert score.value == pytest.approx(plain_reward(generator, story, gold, reasoning), abs=5e-3)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=tokenizer.pad_token_id or 0,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def classifier_scores(path: Path, folder: Path, order: list[int], texts: list[str]) -> dict[int, Any]:
    reward = ModelRewardConfig(
        kind="model", path=str(path), threads=1, timeout_s=300, pool=PoolConfig(workers=1, batch_size=4)
    )
    with closing(build_scorer(reward, None, Surroundings(folder))) as scorer:
        scorer.begin(range(len(texts)))
        for index in order:
            scorer.submit(index, Prompt(f"p{index}", "The fox "), rollout(), texts[index])
        while not scorer.wait(60):
            pass
        return scorer.drain()


def test_a_reward_model_scores_each_text_as_alone_and_in_any_order(classifier: Path, tmp_path: Path) -> None:
    """Last bits that depend on who finished first would make a run unrepeatable; padding must not be read."""
    texts = ["ran.", "ran away and hid.", "sat.", "slept in the sun for a long while.", "ran.", "ate."]
    straight = classifier_scores(classifier, tmp_path, [0, 1, 2, 3, 4, 5], texts)
    turned = classifier_scores(classifier, tmp_path, [5, 3, 1, 0, 4, 2], texts)
    assert {index: score.value for index, score in straight.items()} == {i: s.value for i, s in turned.items()}
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    for index, text in enumerate(texts):
        with torch.no_grad():
            alone = model(**tokenizer(f"The fox {text}", return_tensors="pt")).logits.item()
        assert straight[index].value == pytest.approx(alone, abs=1e-5)
    assert len({score.value for score in straight.values()}) == 5, "the control: texts differ, but for two"


def test_reward_models_that_do_not_fit_are_refused(generator: Path, classifier: Path, tmp_path: Path) -> None:
    """Two outputs are no reward, and a text beyond the limit is not cut in silence."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "two")
    for name, words in (("two", "has 2 outputs, needed one"), ("none", "cannot be loaded")):
        with pytest.raises(ValueError, match=words):
            ClassifierSpec(ModelPlace(str(tmp_path / name)), 10).open()
    source = ClassifierSpec(ModelPlace(str(classifier), threads=1), 20).open()
    samples = [Sample(Prompt("p", "The fox "), text, ()) for text in ("ran. " * 50, "ran.")]
    long, short = source.score(samples)
    assert long.kind == "invalid" and "reward.max_tokens allows 20" in long.detail and isinstance(short, Score)
    one, two = (ModelRewardConfig(kind="model", path=str(path)) for path in (classifier, generator))
    assert fingerprint(one, tmp_path) != fingerprint(two, tmp_path)
