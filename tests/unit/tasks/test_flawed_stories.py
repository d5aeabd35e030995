"""Generated stories: exactly one error or none, no shortcut to the answer, splits that never meet.

The errors are counted by a second, plain implementation that reads nothing but the text.
"""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from lrscale.config.task import FlawedStoriesConfig
from lrscale.records import Score
from lrscale.tasks.flawed_stories import FlawedStories, split_of
from lrscale.tasks.ring import careless_notes
from lrscale.tasks.village import NAMES

RING = FlawedStoriesConfig(world="ring", events=(4, 8), prompt_style="brief", train_prompts=50, eval_prompts=20)
VILLAGE = FlawedStoriesConfig(world="village", train_prompts=50, eval_prompts=20)
RING_PLACES = ["mill", "barn", "port", "cave", "inn", "tower"]
BRIDGE = {"mill": "mill", "barn": "tower", "port": "inn", "cave": "cave", "inn": "port", "tower": "barn"}
FERRY = {"mill": "barn", "barn": "mill", "port": "tower", "tower": "port", "cave": "inn", "inn": "cave"}


def ring_errors(text: str) -> list[int]:
    """Sentence numbers of the claims that do not hold, by walking the ring step by step."""
    place, errors = "", []
    for number, sentence in re.findall(r"(\d+)\. ([^.]+)\.", text):
        words = sentence.split()
        match words[1:]:
            case ["starts", "at", "the", where]:
                place = where
            case ["goes", count, "on"]:
                for _ in range({"one": 1, "two": 2, "three": 3}[count]):
                    place = [*RING_PLACES, "mill"][RING_PLACES.index(place) + 1]
            case ["takes", "the", "bridge"]:
                place = BRIDGE[place]
            case ["takes", "the", "ferry"]:
                place = FERRY[place]
            case ["sweeps", "the", where]:
                errors += [int(number)] * (where != place)
            case _:
                raise AssertionError(f"unknown sentence: {sentence}")
    return errors


class Reader:
    """Reads a village story sentence by sentence and notes what cannot be, by simple rules over the words."""

    def __init__(self, text: str) -> None:
        self.place: dict[str, str] = {}
        self.eyes: dict[str, str] = {}
        self.owner: dict[str, str] = {}
        self.dead: set[str] = set()
        self.errors: list[tuple[int, str]] = []
        for self.number, sentence in enumerate(text.removesuffix(".").split(". "), start=1):
            who, verb, *words = sentence.split()
            if {who, *words} & self.dead:
                self.errors.append((self.number, "dead"))
            getattr(self, verb)(who, [word for word in words if word not in ("at", "the", "to", "from", "of")])

    def must(self, fact: object, expected: object, kind: str) -> None:
        if fact != expected:
            self.errors.append((self.number, kind))

    def has(self, who: str, words: list[str]) -> None:
        if words[1:] == []:
            self.owner[words[0]] = who
        else:
            assert words[1:4] == ["eyes", "and", "is"]
            self.eyes[who], self.place[who] = words[0], words[4]

    def goes(self, who: str, words: list[str]) -> None:
        self.must(words[0] != self.place[who], expected=True, kind="goes where they are")
        self.place[who] = words[0]

    def follows(self, who: str, words: list[str]) -> None:
        self.must(self.place[words[0]], words[1], "place")
        self.place[who] = words[1]

    def gives(self, who: str, words: list[str]) -> None:
        self.must((self.owner[words[0]], self.place[who]), (who, self.place[words[1]]), "thing")
        self.owner[words[0]] = words[1]

    def takes(self, who: str, words: list[str]) -> None:
        self.must((self.owner[words[0]], self.place[who]), (words[1], self.place[words[1]]), "thing")
        self.owner[words[0]] = who

    def dies(self, who: str, words: list[str]) -> None:
        self.waits(who, words)
        self.dead.add(who)

    def looks(self, who: str, words: list[str]) -> None:
        self.must(self.eyes[who], words[2], "eyes")

    def waits(self, who: str, words: list[str]) -> None:
        self.must(self.place[who], words[0], "place")

    def uses(self, who: str, words: list[str]) -> None:
        self.must(self.owner[words[0]], who, "thing")

    def speaks(self, who: str, words: list[str]) -> None:
        assert words == ["weather"]


def village_errors(text: str) -> list[tuple[int, str]]:
    """(sentence number, kind) of every sentence that cannot be."""
    return Reader(text).errors


def test_ring_stories_have_one_error_or_none() -> None:
    """Locks out stories whose label, place of the error or trace disagree with the text."""
    task = FlawedStories(RING, seed=3)
    for index in range(1500):
        story = task.story("train", index)
        errors = ring_errors(story.text)
        assert errors == ([] if story.flaw is None else [story.flaw + 1])
        assert 4 <= len(story.sentences) - 1 <= 8
        assert (story.answer == "Yes") == bool(errors)


def test_village_stories_have_one_error_or_none_and_every_kind_occurs() -> None:
    """Locks out a second, unplanned error (a dead giver, an object in two hands) and kinds that never come."""
    task = FlawedStories(VILLAGE, seed=3)
    kinds: Counter[str] = Counter()
    for index in range(1500):
        story = task.story("train", index)
        errors = village_errors(story.text)
        assert [number for number, _ in errors] == ([] if story.flaw is None else [story.flaw + 1])
        kinds.update(kind for _, kind in errors)
    assert set(kinds) == {"place", "thing", "eyes", "dead"} and min(kinds.values()) > 20, kinds


@pytest.mark.parametrize("characters", [1, 2, 7, 12])
def test_villages_of_any_size_stay_consistent(characters: int) -> None:
    """Locks out stories of one person (nobody to give to) or of many failing or holding no error."""
    config = VILLAGE.model_copy(update={"characters": characters, "events": (1, 20)})
    task = FlawedStories(config, seed=0)
    stories = [task.story("train", index) for index in range(120)]
    assert all(len(village_errors(story.text)) == (story.flaw is not None) for story in stories)
    assert {story.answer for story in stories} == {"Yes", "No"}


def test_more_characters_than_names_is_refused() -> None:
    """Locks out an error from deep inside the generator for a setting that cannot be met."""
    task = FlawedStories(VILLAGE.model_copy(update={"characters": 13}), seed=0)
    with pytest.raises(ValueError, match=f"has {len(NAMES)} names, 13 were asked for"):
        task.prompts("train", markers=True)


@pytest.mark.parametrize("config", [RING, VILLAGE])
def test_flawed_share_is_kept(config: FlawedStoriesConfig) -> None:
    """Locks out a split by hash, or a world, that favours one answer."""
    for share in (0.0, 0.5, 0.8):
        task = FlawedStories(config.model_copy(update={"flawed_share": share}), seed=1)
        flawed = sum(task.story("train", index).flaw is not None for index in range(200)) / 200
        assert abs(flawed - share) <= 3.5 * (share * (1 - share) / 200) ** 0.5


def test_reference_trace_follows_the_text_and_a_conflict_stays() -> None:
    """Locks out a trace with another state than the text, and a verdict that forgets the conflict."""
    task = FlawedStories(RING, seed=5)
    for index in range(300):
        story, trace = task.story("train", index), task.reference_trace(index)
        lines = re.findall(r"(\d+)\. (\w+) (\w+) (\w+), now (\w+), (fine|conflict)\.", trace)
        told = len(story.sentences)
        fine = told if story.flaw is None else story.flaw
        assert [int(line[0]) for line in lines] == list(range(1, told + 1))
        assert [line[5] for line in lines] == ["fine"] * fine + ["conflict"] * (told - fine)
        assert trace.endswith(rf". \boxed{{{story.answer}}}")
        # The state of every line, re-read from the text: a sweep of that place behind it would be no error.
        for count, line in enumerate(lines[:fine], start=1):
            text = " ".join(story.sentences[:count])
            assert ring_errors(f"{text} {count + 1}. {line[1]} sweeps the {line[4]}.") == []


def test_careless_notes_slip_as_often_as_asked() -> None:
    """Locks out a careful writer who errs, and a careless one whose answer does not follow from their notes."""
    task = FlawedStories(RING, seed=6)
    stories = [task.story("train", index) for index in range(600)]
    assert all(
        careless_notes(story, random.Random(0), slip_share=0.0) == ([*story.trace], story.answer) for story in stories
    )
    rng = random.Random(1)
    slips = moves = 0
    for story in stories:
        notes, answer = careless_notes(story, rng, slip_share=0.2)
        assert (answer == "Yes") == notes[-1].endswith("conflict.")
        places = [re.findall(r"now (\w+)", note)[0] for note in notes]
        for index, event in enumerate(story.events[: len(notes)]):
            if event.kind == "goes":
                text = f"1. Anna starts at the {places[index - 1]}. {story.sentences[index]} 99. Anna sweeps the {places[index]}."
                slips += ring_errors(text) == [99]
                moves += 1
    assert abs(slips / moves - 0.2) < 0.03


def test_stories_depend_on_seed_split_and_index_alone() -> None:
    """Locks out a generator that hands out another story after a restart, or when more are asked for."""
    few = FlawedStories(RING.model_copy(update={"train_prompts": 3}), seed=7)
    many = FlawedStories(RING, seed=7)
    late = many.story("train", 40)
    assert few.prompts("train", markers=False) == many.prompts("train", markers=False)[:3]
    assert FlawedStories(RING, seed=7).story("train", 40) == late
    assert FlawedStories(RING, seed=8).story("train", 40) != late
    assert many.story("eval", 40) != late


@pytest.mark.parametrize("config", [RING, VILLAGE])
def test_train_and_eval_never_meet(config: FlawedStoriesConfig) -> None:
    """Locks out evaluation on a story that was trained on, with the same seed or with another."""
    train = {FlawedStories(config, seed=seed).story("train", i).text for seed in (0, 1) for i in range(500)}
    evaluation = {FlawedStories(config, seed=seed).story("eval", i).text for seed in (0, 1) for i in range(100)}
    assert not train & evaluation
    assert {split_of(text) for text in train} == {"train"} and {split_of(text) for text in evaluation} == {"eval"}


def naive_bayes_accuracy(features: list[list[str]], labels: list[bool]) -> float:
    """Held-out accuracy of the plainest classifier, trained on the first three quarters."""
    cut = len(labels) * 3 // 4
    counts = {
        label: Counter(w for f, y in zip(features[:cut], labels[:cut], strict=True) if y == label for w in f)
        for label in (True, False)
    }
    totals = {label: sum(count.values()) for label, count in counts.items()}
    right = 0
    for words, label in zip(features[cut:], labels[cut:], strict=True):
        odds = 1.0
        for word in words:
            odds *= ((counts[True][word] + 1) / (totals[True] + 1)) / ((counts[False][word] + 1) / (totals[False] + 1))
        right += (odds > 1) == label
    return right / (len(labels) - cut)


@pytest.mark.parametrize("view", ["words", "last sentence", "length", "first and last place", "claims"])
def test_ring_answer_cannot_be_read_off_the_surface(view: str) -> None:
    """Locks out shortcuts: word counts, the last sentence, the length, start and last claim, number of claims."""
    task = FlawedStories(RING, seed=11)
    stories = [task.story("train", index) for index in range(6000)]
    features = {
        "words": lambda s: s.text.replace(".", "").split(),
        "last sentence": lambda s: [s.sentences[-1].split(". ")[1]],
        "length": lambda s: [str(len(s.sentences))],
        "first and last place": lambda s: [f"{s.sentences[0].split()[-1]} {s.sentences[-1].split()[-1]}"],
        "claims": lambda s: [str(s.text.count("sweeps"))],
    }[view]
    accuracy = naive_bayes_accuracy([features(story) for story in stories], [s.flaw is not None for s in stories])
    # 1,500 held-out stories: one standard error is 0.013.
    assert accuracy < 0.55


def test_prompts_and_scores() -> None:
    """Locks out credit for an unboxed or wrong answer, unstable ids, and columns that a reward would miss."""
    task = FlawedStories(RING, seed=2)
    prompts = task.prompts("eval", markers=True)
    assert len(prompts) == 20 and len({prompt.prompt_id for prompt in prompts}) == 20
    assert {"answer", "explanation", "events", "world"} <= set(prompts[0].columns)
    for index, prompt in enumerate(prompts):
        wrong = {"Yes": "No", "No": "Yes"}[prompt.columns["answer"]]
        assert task.score(prompt, task.reference_trace(index, "eval")) == Score(1.0)
        assert task.score(prompt, rf"\boxed{{{wrong}}}") == Score(0.0)
        assert task.score(prompt, prompt.columns["answer"]) == Score(0.0)
    assert task.answered(r"\boxed{No}") and not task.answered("No") and not task.answered(r"\boxed{maybe}")


def test_paper_prompts_of_the_ring_state_its_rules() -> None:
    """Locks out asking a model that never saw the ring about places whose order it cannot know."""
    config = RING.model_copy(update={"prompt_style": "paper"})
    assert "lie on a ring" in FlawedStories(config, seed=0).prompt("train", 0, markers=False).text
    assert "lie on a ring" not in FlawedStories(RING, seed=0).prompt("train", 0, markers=False).text
