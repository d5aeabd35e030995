"""Reads YAML into plain values and the place of each: YAML 1.2's scalars, no duplicate keys, no custom tags."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lrscale.config.errors import Place, Problem, RecipeError
from lrscale.config.schema import Key, dotted


@dataclass(frozen=True, slots=True)
class Document:
    """Values as they were written, and where each was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2.

    In YAML 1.1, PyYAML's own dialect, `1e-4` is text, `no` is false and `1:30:00` is 5400.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's name and type


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_file(path: Path) -> Document:
    """A recipe file.

    Raises:
        RecipeError: the file cannot be read, is no YAML, or says a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError([Problem(Place(str(path)), "", f"the recipe cannot be read: {reason}")]) from error
    return parse(text, str(path))


def parse(text: str, source: str, *, lines: bool = True) -> Document:
    """YAML text whose top is a mapping.

    Args:
        text: YAML; empty text is an empty document.
        source: What places are named after.
        lines: Whether places carry line numbers.
    """
    reader = _Reader(source, lines=lines)
    node = _compose(text, source, lines=lines)
    document = Document()
    if node is not None and not (isinstance(node, yaml.ScalarNode) and node.value == ""):
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError([Problem(reader.place(node), "", "a recipe is a mapping of keys to values, this is not")])
        document = Document(reader.mapping(node, ()), reader.places)
    if reader.problems:
        raise RecipeError(reader.problems)
    return document


def parse_value(text: str, source: str, key: Key) -> Document:
    """The value of a `--set` as YAML, put at `key`."""
    reader = _Reader(source, lines=False)
    node = _compose(text, source, lines=False, key=key)
    value = None if node is None else reader.value(node, key)
    if reader.problems:
        raise RecipeError(reader.problems)
    for part in reversed(key):
        value = {str(part): value}
    for length in range(1, len(key) + 1):
        reader.places.setdefault(key[:length], Place(source))
    return Document(value if isinstance(value, dict) else {}, reader.places)


def _compose(text: str, source: str, *, lines: bool, key: Key = ()) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = Place(source, mark.line + 1 if mark is not None and lines else 0)
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RecipeError([Problem(place, dotted(key), f"this is not YAML: {reason}")]) from error
    return node


_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _Reader:
    """Turns one node tree into values; collects places and problems on the way."""

    def __init__(self, source: str, *, lines: bool) -> None:
        self._source = source
        self._lines = lines
        self._constructor = yaml.constructor.SafeConstructor()
        self._open: set[int] = set()
        self.places: dict[Key, Place] = {}
        self.problems: list[Problem] = []

    def place(self, node: yaml.Node) -> Place:
        return Place(self._source, node.start_mark.line + 1 if self._lines else 0)

    def value(self, node: yaml.Node, key: Key) -> Any:
        self.places[key] = self.place(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        if id(node) in self._open:
            self._problem(node, key, "an alias (*name) stands inside the value that it repeats")
            return None
        if node.tag not in _COLLECTIONS:
            self._problem(node, key, f"the tag {node.tag} is not allowed in a recipe")
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, key)
            return [self.value(child, (*key, index)) for index, child in enumerate(node.value)]
        finally:
            self._open.discard(id(node))

    def mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = name_node.value if isinstance(name_node, yaml.ScalarNode) else None
            if name is None or name == "<<":
                help_ = "compose recipes on the command line instead: lrscale launch a.yaml b.yaml" if name else ""
                self._problem(name_node, key, f"a key is plain text, {name or 'a list or mapping'!r} is not", help_)
                continue
            if name in values:
                first = self.places[(*key, name)]
                self._problem(name_node, (*key, name), f"{name} is given twice, first at {first}", "keep one of them")
                continue
            values[name] = self.value(value_node, (*key, name))
            # The key's own line, which is where people look; a section's value starts one line below.
            self.places[(*key, name)] = self.place(name_node)
        return values

    def _scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        kind = node.tag.rsplit(":", 1)[-1]
        if kind == "int":
            return int(node.value, 0) if node.value[:2] in ("0o", "0x") else int(node.value)
        if kind not in ("str", "bool", "null", "float"):
            self._problem(node, key, f"the tag {node.tag} is not allowed in a recipe")
            return None
        if kind == "float" and not re.search(r"inf|nan", node.value, re.IGNORECASE):
            return float(node.value)
        return self._constructor.construct_object(node)

    def _problem(self, node: yaml.Node, key: Key, message: str, help_: str = "") -> None:
        self.problems.append(Problem(self.place(node), dotted(key), message, help_))
