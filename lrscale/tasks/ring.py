"""The world `ring`: one walker in a village whose six places lie on a ring.

The place is a number modulo 6. Moves add to it or mirror it, and the two do not commute, so
the place after k moves can only be had by following all k. Now and then the walker sweeps the
place where they are; a flawed story has them sweep another one. Words, their counts and the
last sentence say next to nothing about the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lrscale.tasks.story import Event, Story, explain

NAMES = ("Anna", "Ben", "Cara", "Dan", "Eva", "Finn")
PLACES = ("mill", "barn", "port", "cave", "inn", "tower")
STEPS = ("one", "two", "three", "bridge", "ferry")
SETTING = (
    "The six places of the village lie on a ring, in this order: mill, barn, port, cave, inn, tower; after the tower "
    "comes the mill again. To go one, two or three on is to go that many places further along the ring. The bridge "
    "joins the barn with the tower and the port with the inn; taken at the mill or at the cave it leads back to where "
    "it was taken. The ferry joins the mill with the barn, the port with the tower and the cave with the inn. Whoever "
    "sweeps a place is there; sweeping moves nobody."
)

_CLAIM_SHARE = 0.35


def moved(place: int, step: str) -> int:
    """The place (0 to 5) that a step leads to."""
    match step:
        case "bridge":
            return -place % 6
        case "ferry":
            return (1 - place) % 6
        case _:
            return (place + STEPS.index(step) + 1) % 6


def ring_story(rng: random.Random, *, events: tuple[int, int], flawed_share: float) -> Story:
    """A story of one opening sentence and `events` (fewest, most) further ones, the last of them a claim."""
    actor = rng.choice(NAMES)
    place = rng.randrange(6)
    told = [Event("starts", actor, place=PLACES[place])]
    places = [place]
    count = rng.randint(*events)
    for left in reversed(range(count)):
        # Two claims in a row could be compared without following any move: a claim never follows a claim,
        # and the one before the last sentence is always a move.
        claim = left == 0 or (left > 1 and told[-1].kind == "goes" and rng.random() < _CLAIM_SHARE)
        if claim:
            told.append(Event("sweeps", actor, place=PLACES[place]))
        else:
            step = rng.choice(STEPS)
            place = moved(place, step)
            told.append(Event("goes", actor, step=step))
        places.append(place)
    flaw = None
    if rng.random() < flawed_share:
        # Planted last, so that sound and flawed stories are drawn from the same distribution of moves and claims.
        flaw = rng.choice([index for index, event in enumerate(told) if event.kind == "sweeps"])
        wrong = rng.choice([name for name in PLACES if name != PLACES[places[flaw]]])
        told[flaw] = replace(told[flaw], place=wrong)
    return _tell(told, [PLACES[place] for place in places], flaw)


def careless_notes(story: Story, rng: random.Random, *, slip_share: float) -> tuple[list[str], str]:
    """Notes on a ring story by somebody who slips: (sentences, answer), in the shape of the reference trace.

    After each move, with probability `slip_share`, another place is written down (and believed from
    then on); at each claim, as often, the wrong verdict. A conflict that was seen once stays. With a share
    of 0 they are the reference trace.
    """
    sentences = []
    place = 0
    conflict = False
    for index, event in enumerate(story.events):
        if event.kind == "starts":
            place = PLACES.index(str(event.place))
        elif event.kind == "sweeps":
            conflict = conflict or (event.place != PLACES[place]) != (rng.random() < slip_share)
        else:
            place = moved(place, str(event.step))
            if rng.random() < slip_share:
                place = (place + rng.randrange(1, 6)) % 6
        sentences.append(_note_sentence(index, event, PLACES[place], conflict=conflict))
    return sentences, "Yes" if conflict else "No"


def _tell(told: Sequence[Event], places: Sequence[str], flaw: int | None) -> Story:
    trace = [
        _note_sentence(i, event, place, conflict=flaw is not None and i >= flaw)
        for i, (event, place) in enumerate(zip(told, places, strict=True))
    ]
    sentences = [f"{index + 1}. {event.actor} {_sentence(event)}." for index, event in enumerate(told)]
    truth = "" if flaw is None else f"{told[flaw].actor} is at the {places[flaw]}"
    return Story(tuple(told), tuple(sentences), tuple(trace), flaw, explain(flaw, truth))


def _sentence(event: Event) -> str:
    if event.kind == "starts":
        return f"starts at the {event.place}"
    if event.kind == "sweeps":
        return f"sweeps the {event.place}"
    return f"takes the {event.step}" if event.step in ("bridge", "ferry") else f"goes {event.step} on"


def _note_sentence(index: int, event: Event, place: str, *, conflict: bool) -> str:
    """One sentence of a trace: the event in two words, the place after it, the verdict so far; one shape for all."""
    if event.kind in ("starts", "sweeps"):
        note = f"{event.kind} {event.place}"
    else:
        note = f"takes {event.step}" if event.step in ("bridge", "ferry") else f"goes {event.step}"
    return f"{index + 1}. {event.actor} {note}, now {place}, {'conflict' if conflict else 'fine'}."
