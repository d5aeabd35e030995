"""The world `village`: who is where, who has what, who lives, and who has which eyes.

A sound story is drawn first, event by event, against the exact state. A flawed one is the same
story with one claim made wrong. Claims (waiting, using, speaking, eye colour) change nothing, so
the rest of the story stays sound and the planted error is the only one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lrscale.tasks.story import Event, Story, explain

NAMES = ("Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gwen", "Hugo", "Ida", "Jan", "Kate", "Leo")
PLACES = ("mill", "barn", "port", "cave", "inn", "tower")
THINGS = ("lamp", "key", "rope", "map", "ring", "coin")
COLOURS = ("blue", "green", "brown", "grey")

_WEIGHTS = {
    "moves": 5,
    "follows": 3,
    "gives": 3,
    "takes": 3,
    "dies": 1,
    "describes": 2,
    "waits": 3,
    "uses": 3,
    "speaks": 3,
}


@dataclass(slots=True)
class _State:
    at: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    eyes: dict[str, str] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)

    @property
    def alive(self) -> list[str]:
        return [name for name in self.at if name not in self.dead]

    def copy(self) -> _State:
        return _State(dict(self.at), dict(self.holder), dict(self.eyes), list(self.dead))


def village_story(rng: random.Random, *, events: tuple[int, int], characters: int, flawed_share: float) -> Story:
    """A story that introduces its people and things, then tells `events` (fewest, most) events."""
    if characters > len(NAMES):
        raise ValueError(f"characters: the village has {len(NAMES)} names, {characters} were asked for")
    told = _introduction(rng, characters)
    state = _State()
    after = [_applied(state, event) for event in told]
    count = rng.randint(*events)
    for left in reversed(range(count)):
        event = _draw(rng, state, last=left == 0)
        told.append(event)
        after.append(_applied(state, event))
    flaw = None
    if rng.random() < flawed_share:
        flaw, told[flaw] = _planted(rng, told, after)
    return _tell(told, after, flaw)


def _introduction(rng: random.Random, characters: int) -> list[Event]:
    people = rng.sample(NAMES, characters)
    things = rng.sample(THINGS, min(characters, len(THINGS)))
    lives = [Event("lives", name, place=rng.choice(PLACES), colour=rng.choice(COLOURS)) for name in people]
    return lives + [Event("owns", rng.choice(people), thing=thing) for thing in things]


def _draw(rng: random.Random, state: _State, *, last: bool) -> Event:
    kinds = dict(_WEIGHTS)
    while True:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        choices = _possible(kind, state)
        if last:
            # The last event is a claim that could be made wrong, so that every story has room for an error.
            choices = [event for event in choices if _false_claims(event, state)]
        if choices:
            return rng.choice(choices)
        del kinds[kind]  # waiting is always possible, and can always be made wrong: some kind is left


def _possible(kind: str, state: _State) -> list[Event]:
    """Every event of a kind that may happen now."""
    at, alive = state.at, state.alive
    pairs = [(a, b) for a in alive for b in alive if a != b]
    held = [(thing, name) for thing, name in state.holder.items() if name in alive]
    match kind:
        case "moves":
            return [Event(kind, name, place=place) for name in alive for place in PLACES if place != at[name]]
        case "follows":
            return [Event(kind, a, other=b, place=at[b]) for a, b in pairs if at[a] != at[b]]
        case "gives":
            return [Event(kind, a, other=b, thing=t) for t, a in held for b in alive if a != b and at[a] == at[b]]
        case "takes":
            return [Event(kind, a, other=b, thing=t) for t, b in held for a in alive if a != b and at[a] == at[b]]
        case "dies":
            # Two stay alive (so a story of two people knows no death), or nobody is left to give and follow.
            return [Event(kind, name, place=at[name]) for name in alive] if len(alive) > 2 else []
        case "describes":
            return [Event(kind, name, colour=state.eyes[name]) for name in alive]
        case "waits":
            return [Event(kind, name, place=at[name]) for name in alive]
        case "uses":
            return [Event(kind, name, thing=thing) for thing, name in held]
        case _:
            return [Event(kind, name) for name in alive]


def _applied(state: _State, event: Event) -> _State:
    """Moves `state` on by one event and returns a copy of what holds after it."""
    match event.kind:
        case "lives":
            state.at[event.actor], state.eyes[event.actor] = event.place, event.colour
        case "moves" | "follows":
            state.at[event.actor] = event.place
        case "owns" | "takes":
            state.holder[event.thing] = event.actor
        case "gives":
            state.holder[event.thing] = event.other
        case "dies":
            state.dead.append(event.actor)
    return state.copy()


def _planted(rng: random.Random, told: list[Event], after: list[_State]) -> tuple[int, Event]:
    """One claim made wrong, each kind of error as likely as another where the story has room for it."""
    wrong: dict[str, list[tuple[int, Event]]] = {}
    for index, (event, state) in enumerate(zip(told, after, strict=True)):
        for false_event in _false_claims(event, state):
            wrong.setdefault(event.kind, []).append((index, false_event))
    return rng.choice(wrong[rng.choice(sorted(wrong))])


def _false_claims(event: Event, state: _State) -> list[Event]:
    match event.kind:
        case "waits":
            return [replace(event, place=place) for place in PLACES if place != state.at[event.actor]]
        case "uses":
            return [replace(event, actor=name) for name in state.alive if name != event.actor]
        case "describes":
            return [replace(event, colour=colour) for colour in COLOURS if colour != state.eyes[event.actor]]
        case "speaks":
            return [replace(event, actor=name) for name in state.dead]
        case _:
            return []


_SENTENCES: dict[str, Callable[[Event], str]] = {
    "lives": lambda e: f"{e.actor} has {e.colour} eyes and is at the {e.place}",
    "owns": lambda e: f"{e.actor} has the {e.thing}",
    "moves": lambda e: f"{e.actor} goes to the {e.place}",
    "follows": lambda e: f"{e.actor} follows {e.other} to the {e.place}",
    "gives": lambda e: f"{e.actor} gives the {e.thing} to {e.other}",
    "takes": lambda e: f"{e.actor} takes the {e.thing} from {e.other}",
    "dies": lambda e: f"{e.actor} dies at the {e.place}",
    "describes": lambda e: f"{e.actor} looks up with {e.colour} eyes",
    "waits": lambda e: f"{e.actor} waits at the {e.place}",
    "uses": lambda e: f"{e.actor} uses the {e.thing}",
    "speaks": lambda e: f"{e.actor} speaks of the weather",
}


def _fact(event: Event, state: _State) -> str:
    """What is true after an event, of what the event speaks of."""
    match event.kind:
        case "lives" | "moves" | "follows" | "waits":
            return f"{event.actor} is at the {state.at[event.actor]}"
        case "owns" | "gives" | "takes" | "uses":
            return f"the {event.thing} is with {state.holder[event.thing]}"
        case "describes":
            return f"{event.actor} has {state.eyes[event.actor]} eyes"
        case _:
            return f"{event.actor} is {'dead' if event.actor in state.dead else 'alive'}"


def _tell(told: list[Event], after: list[_State], flaw: int | None) -> Story:
    plain = [_SENTENCES[event.kind](event) for event in told]
    facts = [_fact(event, state) for event, state in zip(told, after, strict=True)]
    end = len(told) if flaw is None else flaw + 1
    trace = [
        f"{index + 1}. {plain[index]}; {facts[index]}, {'conflict' if index == flaw else 'fine'}."
        for index in range(end)
    ]
    truth = "" if flaw is None else facts[flaw]
    return Story(tuple(told), tuple(f"{text}." for text in plain), tuple(trace), flaw, explain(flaw, truth))
