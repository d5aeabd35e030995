"""Questions about the recipe's sections: which keys there are, and what each of them takes."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import annotated_types
from pydantic import StringConstraints
from pydantic.fields import FieldInfo

from lrscale.config.base import Section
from lrscale.config.recipe import Recipe

Key: TypeAlias = tuple[str | int, ...]
"""Path of a value: names of keys, and positions in lists."""


def dotted(key: Key) -> str:
    """The key as people write it: `stages.rl.arms[1]`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def variants(annotation: Any) -> tuple[type[Section], ...]:
    """The sections an annotation stands for: none for a plain value, several for a union told apart by `kind`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return variants(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(section for member in get_args(annotation) for section in variants(member))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (annotation,)
    return ()


def kind_of(section: type[Section]) -> str:
    """The one value of the section's `kind`, empty where it has no kind or leaves a choice."""
    field = section.model_fields.get("kind")
    kinds = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return str(kinds[0]) if len(kinds) == 1 else ""


def default_kind(field: FieldInfo) -> str:
    """`kind` of a union section that a recipe does not name, empty where it has to be named."""
    default = field.get_default(call_default_factory=True, validated_data={})
    return kind_of(type(default)) if isinstance(default, Section) else ""


def pick(field: FieldInfo, values: Any) -> type[Section] | None:
    """The section that `values` of this field are meant for, None for a plain value or an unknown kind."""
    choices = variants(field.annotation)
    if len(choices) < 2:
        return choices[0] if choices else None
    kind = values.get("kind", default_kind(field)) if isinstance(values, Mapping) else default_kind(field)
    return next((section for section in choices if kind_of(section) == kind), None)


def shared_keys(one: type[Section] | None, other: type[Section] | None) -> set[str]:
    """Keys that two kinds of a section have from a class that says so: they mean the same in both."""
    if one is None or other is None:
        return set()
    bases = [base for base in one.__mro__ if issubclass(base, Section) and issubclass(other, base)]
    common = [base for base in bases if getattr(base, "outlives_kind", False)]
    return {key for base in common for key in base.model_fields}


def field_at(values: Any, key: Key) -> FieldInfo | None:
    """The field behind a key (that of the list, for an element of one), None for a key nobody knows."""
    section: type[Section] | None = Recipe
    field: FieldInfo | None = None
    for part in key:
        if isinstance(part, int):
            break
        field = section.model_fields.get(part) if section is not None else None
        if field is None:
            return None
        values = values.get(part) if isinstance(values, Mapping) else None
        section = pick(field, values)
    return field


def all_keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe, sections and all variants of unions included (some come twice)."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for choice in variants(field.annotation):
            yield from all_keys(choice, f"{prefix}{name}.")


def suggestion(name: str, section: type[Section], prefix: str) -> str:
    """What was probably meant by an unknown key of `section`, as a sentence; empty where nothing is near."""
    near = difflib.get_close_matches(name, section.model_fields, n=1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    elsewhere: dict[str, list[str]] = {}
    for key in dict.fromkeys(all_keys()):
        elsewhere.setdefault(key.rsplit(".", 1)[-1], []).append(key)
    near = [name] if name in elsewhere else difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)
    return f"did you mean {' or '.join(elsewhere[near[0]][:4])}?" if near else ""


_BASICS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
}
_BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def allowed(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """What an annotation takes, in words: `a whole number, at least 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(arguments[0], (*arguments[1:], *metadata))
    if isinstance(annotation, type) and annotation in _BASICS:
        return _BASICS[annotation] + _limits(metadata)
    if origin is Literal:
        return "one of: " + ", ".join(str(value) for value in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each element {allowed(arguments[0])}"
        return f"a list of {len(arguments)}, each element {allowed(arguments[0])}"
    choices = variants(annotation)
    if choices:
        kinds = ", ".join(kind_of(choice) for choice in choices)
        return f"a section (kind: {kinds})" if len(choices) > 1 else "a section of keys"
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(member, metadata if member is not types.NoneType else ()) for member in arguments)
    return str(annotation)


def _limits(metadata: tuple[Any, ...]) -> str:
    words = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            words.append(_limits(tuple(item.metadata)))
        elif isinstance(item, StringConstraints):
            words.append(f", matching {item.pattern}")
        elif isinstance(item, annotated_types.BaseMetadata):
            words += [f", {word} {getattr(item, name)}" for name, word in _BOUNDS if hasattr(item, name)]
    return "".join(words)
