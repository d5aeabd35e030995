"""From recipe files and overrides to one validated Recipe, and back to JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lrscale.config.checks import Conflict, absolute, conflicts, files_of, missing_files
from lrscale.config.cluster_file import asks_for_slurm, read_cluster_file
from lrscale.config.compose import Option, compose, read_overrides, with_options, with_section_defaults
from lrscale.config.errors import Place, Problem, RecipeError, RecipeNotFoundError
from lrscale.config.recipe import Recipe
from lrscale.config.schema import (
    Key,
    allowed,
    dotted,
    field_at,
    kind_of,
    pick,
    suggestion,
    variants,
)
from lrscale.config.shipped import find_recipe
from lrscale.config.source import Document, read_file

DEFAULT_RECIPE = "tiny-cpu"


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe, and where each value that is no default was written."""

    recipe: Recipe
    places: Mapping[str, Place]
    """Dotted key to file and line, or to the `--set`."""
    slurm: bool = False
    """Whether the run goes to SLURM."""


def load_recipe(
    paths: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    options: Sequence[Option] = (),
    *,
    slurm: bool | None = False,
    cluster_file: Path | None = None,
) -> LoadedRecipe:
    """Reads recipes, composed left to right, with `a.b=c` overrides on top.

    Args:
        paths: Recipe files, or names of shipped recipes; none means tiny-cpu.
        overrides: `key=value`, the key dotted, the value YAML.
        options: What the command line says in options of their own; above the overrides.
        slurm: Whether the run goes to SLURM; None lets the recipe decide.
        cluster_file: Lies below the recipes where the run goes to SLURM; need not be there.

    Raises:
        RecipeError: naming every problem with file, line, key, value and what is allowed.
    """
    documents: list[Document] = []
    problems: list[Problem] = []
    for path in paths or (DEFAULT_RECIPE,):
        try:
            documents.append(read_file(find_recipe(path)))
        except RecipeNotFoundError:
            raise
        except RecipeError as error:
            problems += error.problems
    try:
        documents.append(read_overrides(overrides))
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    document = with_options(compose(documents), options)
    slurm = asks_for_slurm(document) if slurm is None else slurm
    if slurm and cluster_file is not None:
        document = with_options(compose([read_cluster_file(cluster_file), *documents]), options)
    return replace(_resolve(document), slurm=slurm)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved form, every default written out; `read_recipe` gives back an equal recipe."""
    return recipe.model_dump_json(indent=2) + "\n"


def read_recipe(path: Path) -> Recipe:
    """A resolved recipe, as it lies in a run directory. Files that it names are not looked for.

    Raises:
        RecipeError: the file cannot be read or is no valid recipe.
    """
    document = read_file(path)
    return _validate(document.values, document.places)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted keys to plain values; lists stay whole."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(recipe.model_dump(mode="json"), ""))


def _resolve(document: Document) -> LoadedRecipe:
    values, places = with_section_defaults(document.values), document.places
    for key, needed in list(files_of(values)):
        path = absolute(_at(values, key), _place(key, places), needed=needed)
        values = _replaced(values, key, path)
    recipe = _validate(values, places)
    found = [_located(conflict, places) for conflict in (*conflicts(recipe), *missing_files(recipe))]
    if found:
        raise RecipeError(found)
    return LoadedRecipe(recipe, {dotted(key): place for key, place in places.items()})


def _located(conflict: Conflict, places: Mapping[Key, Place]) -> Problem:
    return Problem(_place(conflict.key, places), dotted(conflict.key), conflict.message, conflict.help)


def _place(key: Key, places: Mapping[Key, Place]) -> Place:
    """The place of the key, or of the nearest section around it that was written down."""
    for length in range(len(key), 0, -1):
        if key[:length] in places:
            return places[key[:length]]
    return next(iter(places.values()), Place("defaults"))


def _validate(values: Mapping[str, Any], places: Mapping[Key, Place]) -> Recipe:
    try:
        # By way of JSON pydantic can be strict and still take lists for tuples; 5 is no text, "5" no number.
        return Recipe.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        found = [_problem(details, values, places) for details in error.errors(include_url=False)]
        raise RecipeError(sorted(set(found), key=lambda problem: (problem.place.source, problem.place.line))) from error


def _problem(details: ErrorDetails, values: Mapping[str, Any], places: Mapping[Key, Place]) -> Problem:
    key = _key(details["loc"], values)
    place, name, kind = _place(key, places), dotted(key), details["type"]
    field = field_at(values, key)
    if kind == "extra_forbidden":
        return _unknown_key(key, values, place)
    if kind == "value_error":
        return Problem(place, name, str(details["ctx"]["error"]), _description(field))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key, name = (*key, "kind"), f"{name}.kind"
        kinds = ", ".join(kind_of(choice) for choice in variants(field.annotation)) if field is not None else ""
        given = _shown(_at(values, key)) if kind == "union_tag_invalid" else "missing"
        return Problem(_place(key, places), name, f"{name} is {given}; allowed: one of: {kinds}")
    takes = allowed(field.annotation, tuple(field.metadata)) if field is not None else details["msg"]
    if kind == "missing" and isinstance(key[-1], str):
        return Problem(place, name, f"{name} is missing; needs {takes}", _description(field))
    given_key = key[:-1] if kind == "missing" else key
    element = len(given_key) > 0 and isinstance(given_key[-1], int)
    words = (
        f"{dotted(given_key)} is {_shown(_at(values, given_key))}; allowed{' for the list' if element else ''}: {takes}"
    )
    return Problem(place, dotted(given_key), words, _description(field))


def _unknown_key(key: Key, values: Mapping[str, Any], place: Place) -> Problem:
    section: type[Any] | None = Recipe
    outer: FieldInfo | None = None
    inside: Any = values
    for part in key[:-1]:
        outer = section.model_fields.get(str(part)) if section is not None else None
        inside = inside.get(part) if isinstance(inside, Mapping) else None
        section = pick(outer, inside) if outer is not None else None
    known = section or Recipe
    prefix = "".join(f"{part}." for part in key[:-1])
    kind = f" (kind: {kind_of(known)})" if kind_of(known) else ""
    message = (
        f"unknown key {dotted(key)}; {prefix.rstrip('.') or 'a recipe'}{kind} has: {', '.join(known.model_fields)}"
    )
    kinds = (
        [kind_of(choice) for choice in variants(outer.annotation) if key[-1] in choice.model_fields] if outer else []
    )
    help_ = f"it goes with {prefix}kind: {' or '.join(kinds)}" if kinds else suggestion(str(key[-1]), known, prefix)
    return Problem(place, dotted(key), message, help_)


def _key(location: tuple[str | int, ...], values: Any) -> Key:
    """pydantic's location without the kinds of unions, which it lists as if they were keys."""
    key: list[str | int] = []
    section: type[Any] | None = Recipe
    rest = list(location)
    while rest:
        part = rest.pop(0)
        key.append(part)
        field = section.model_fields.get(str(part)) if section is not None else None
        inside = isinstance(values, Mapping) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        )
        values = (values.get(part) if isinstance(values, Mapping) else values[int(part)]) if inside else None
        section = pick(field, values) if field is not None else None
        if field is not None and len(variants(field.annotation)) > 1 and rest:
            rest.pop(0)
    return tuple(key)


def _at(values: Any, key: Key) -> Any:
    for part in key:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def _replaced(values: Any, key: Key, value: Any) -> Any:
    """A copy of `values` with another value at an existing key."""
    if not key:
        return value
    copy = dict(values) if isinstance(values, Mapping) else list(values)
    copy[key[0]] = _replaced(copy[key[0]], key[1:], value)  # type: ignore[index]
    return copy


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _description(field: Any) -> str:
    return " ".join((getattr(field, "description", None) or "").split())
