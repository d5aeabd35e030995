"""Puts recipes and overrides on top of each other, left to right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lrscale.config.base import Section
from lrscale.config.errors import Place, Problem, RecipeError
from lrscale.config.recipe import Recipe
from lrscale.config.schema import Key, default_kind, dotted, kind_of, pick, shared_keys, variants
from lrscale.config.source import Document, parse_value

_DOTTED_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Option(NamedTuple):
    """An option of the command line that stands for a key: `--nodes 8`."""

    name: str
    key: str
    value: str | int | float


def with_options(document: Document, options: Iterable[Option]) -> Document:
    """The document with the options on top; places still tell where a recipe said it."""
    for option in options:
        key: Key = tuple(option.key.split("."))
        former = document.places.get(key)
        place = Place(f"{option.name} {option.value}")
        if former is not None:
            place = replace(former, note=f"overridden by {option.name}")
        values: Any = option.value
        for part in reversed(key):
            values = {part: values}
        document = Document(_merge(document.values, values, Recipe), {**document.places, key: place})
    return document


def read_overrides(overrides: Sequence[str]) -> Document:
    """All `a.b=c` as one document; of a key named twice the last counts.

    Raises:
        RecipeError: an override that is no `key=value`, whose value is no YAML, or that contradicts another one.
    """
    document = Document()
    problems: list[Problem] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        name, place = name.strip(), Place(f"--set {override}")
        if not equals or not _DOTTED_KEY.fullmatch(name):
            needs = "an override is written key=value, the key with dots"
            problems.append(Problem(place, "", f"{needs}; {override!r} is not", "for example --set stages.rl.steps=40"))
            continue
        try:
            single = parse_value(text, place.source, tuple(name.split(".")))
        except RecipeError as error:
            problems += error.problems
            continue
        clash = _clash(document.values, single.values, ())
        if clash is not None:
            problems.append(
                Problem(place, dotted(clash), f"{dotted(clash)} was set to a value by another --set as well")
            )
            continue
        # Plainly, by no kind: the order of `task.kind=jsonl` and `task.train=x` does not matter.
        document = Document(_merge(document.values, single.values, None), document.places | single.places)
    if problems:
        raise RecipeError(problems)
    return document


def _clash(base: Mapping[str, Any], over: Mapping[str, Any], key: Key) -> Key | None:
    """The first key that is a section in one and a value in the other."""
    for name in base.keys() & over.keys():
        below, above = base[name], over[name]
        if isinstance(below, Mapping) != isinstance(above, Mapping):
            return (*key, name)
        if isinstance(below, Mapping) and (found := _clash(below, above, (*key, name))) is not None:
            return found
    return None


def compose(documents: Iterable[Document]) -> Document:
    """One document out of several: sections merge key by key, everything else is replaced by what comes later.

    A section whose `kind` changes keeps what every way takes (rollout.max_new_tokens) and loses the rest: the keys of
    another kind mean nothing there.
    """
    result = Document()
    for document in documents:
        values = _merge(result.values, document.values, Recipe)
        places = {key: place for key, place in result.places.items() if _holds(values, key)}
        result = replace(result, values=values, places=places | document.places)
    return result


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], section: type[Section] | None) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        field = section.model_fields.get(name) if section is not None else None
        former = merged.get(name)
        if isinstance(former, Mapping) and isinstance(value, Mapping):
            changed = field is not None and len(variants(field.annotation)) > 1 and "kind" in value
            if changed and field is not None and former.get("kind", default_kind(field)) != value["kind"]:
                kept = shared_keys(pick(field, former), pick(field, value))
                merged[name] = _merge({key: former[key] for key in former if key in kept}, value, pick(field, value))
            else:
                merged[name] = _merge(former, value, pick(field, {**former, **value}) if field is not None else None)
        else:
            merged[name] = value
    return merged


def _holds(values: Any, key: Key) -> bool:
    """Whether a key still exists after a merge (elements of lists belong to whichever list won)."""
    for part in key:
        if isinstance(part, int):
            return isinstance(values, list) and part < len(values)
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def with_section_defaults(values: Mapping[str, Any], section: type[Section] = Recipe) -> dict[str, Any]:
    """Fills a section written in part from the default of its field, which may differ from that of its class.

    So `projector_sft.schedule.warmup_share` alone leaves that schedule a cosine, and a union section that leaves its
    `kind` out gets the default one.
    """
    filled = dict(values)
    for name, field in section.model_fields.items():
        value = filled.get(name)
        if not isinstance(value, Mapping):
            continue
        chosen = pick(field, value)
        if chosen is None:
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        if type(default) is chosen:
            written = default.model_dump(mode="json", exclude_unset=True)
            kind = {"kind": kind_of(chosen)} if kind_of(chosen) else {}
            value = {**kind, **written, **value}
        filled[name] = with_section_defaults(value, chosen)
    return filled
