"""Reward functions in a user's file: found, recognised by signature, called, and their answers checked.

Two forms are taken, told apart by the names of their parameters:

    TRL        def reward(prompts, completions, **columns) -> list[float]
    OpenRLHF   def reward_func(queries, prompts, labels, **columns) -> list, tensor or {"rewards": ...}

All arguments are lists with one entry a sample, passed by keyword. Prompts and completions are
plain strings (TRL's conversational form, lists of messages, is not offered); the prompt is the
task's text without a chat template. `queries` is prompt + completion, `labels` the column `answer`.
Other columns of the data arrive under their own names where the function takes them, in both
forms, and so do `completion_ids` (lists of token ids, as in TRL) and `latent_steps` (how many the
completion took). Functions are synchronous.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from lrscale.records import Score, ScoreFailed
from lrscale.reward.source import CallNeeds, Needs, Passing, PassingError, Result, Sample

USUAL_NAMES = ("reward", "reward_func", "reward_fn")
BOTH_FORMS = """\
  TRL:       def reward(prompts, completions, **columns) -> list[float]
  OpenRLHF:  def reward_func(queries, prompts, labels, **columns) -> list, tensor or {"rewards": ...}"""
DETAIL_CHARS = 4000
TRACEBACK_FRAMES = 8

Form = Literal["trl", "openrlhf"]
OWN_ARGUMENTS: Mapping[Form, frozenset[str]] = {
    "trl": frozenset({"prompts", "completions", "completion_ids", "latent_steps"}),
    "openrlhf": frozenset({"queries", "prompts", "labels", "completion_ids", "latent_steps"}),
}


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A user's function with what was found out about its signature."""

    call: Callable[..., Any]
    form: Form
    origin: str
    """`file:line: name(signature)`, for messages."""
    file: str
    takes: frozenset[str]
    """Parameters that may be passed by keyword."""
    required: frozenset[str]
    """Those of them without a default."""
    takes_any: bool
    """Whether there is a `**columns`."""

    def needs(self) -> Needs:
        """What it needs of the data's columns."""
        return Needs((CallNeeds(self.origin, OWN_ARGUMENTS[self.form], self.required),))

    def arguments(self, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        """Keyword arguments for a call over these samples; fresh lists every time."""
        names = {name for sample in samples for name in sample.prompt.columns}
        given: dict[str, list[Any]] = {name: [s.prompt.columns.get(name) for s in samples] for name in sorted(names)}
        given["prompts"] = [s.prompt.text for s in samples]
        given["completion_ids"] = [list(s.completion_ids) for s in samples]
        given["latent_steps"] = [s.latent_steps for s in samples]
        if self.form == "trl":
            given["completions"] = [s.completion for s in samples]
        else:
            given["queries"] = [s.prompt.text + s.completion for s in samples]
            given["labels"] = [s.prompt.columns.get("answer") for s in samples]
        return {name: values for name, values in given.items() if self.takes_any or name in self.takes}

    def score(self, samples: Sequence[Sample]) -> list[Result]:
        """One result a sample, in order.

        A call that raises is repeated one sample at a time, so that a sample the function cannot
        digest takes no other along.
        """
        if not samples:
            return []
        try:
            raw = self.call(**self.arguments(samples))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function may raise anything; it is counted
            if len(samples) > 1:
                return [self.score([sample])[0] for sample in samples]
            return [self._failed(samples[0], error)]
        return as_scores(raw, len(samples), form=self.form)

    def _failed(self, sample: Sample, error: BaseException) -> ScoreFailed | Passing:
        detail = f"{self.origin} raised on a sample of prompt {sample.prompt.prompt_id!r}\n"
        detail += user_traceback(error, self.file)
        if isinstance(error, TypeError) and "string indices must be integers" in str(error):
            detail += (
                "\nCompletions and prompts are plain strings here; TRL's conversational form "
                "(completion[0]['content']) is not offered. Use the completion itself."
            )
        if isinstance(error, PassingError | ConnectionError | TimeoutError):
            return Passing(ScoreFailed("unavailable", detail))
        return ScoreFailed("error", detail)


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """A function in a user's file."""

    path: str
    name: str = ""

    def open(self) -> RewardFunction:
        return load_reward_function(Path(self.path), self.name)


def load_reward_function(path: Path, name: str = "") -> RewardFunction:
    """The function called `name` in the file at `path`, ready to be called.

    Without a name the file must define exactly one of `reward`, `reward_func`, `reward_fn`.
    Raises ValueError, with the file and line, for a file that is missing or does not run, and for
    a function whose signature is neither of the two forms.
    """
    module = _load_module(path)
    found = [n for n in (name,) if n] or [n for n in USUAL_NAMES if hasattr(module, n)]
    if len(found) != 1 or not callable(getattr(module, found[0], None)):
        wanted = f"a function {name!r}" if name else "exactly one of " + ", ".join(USUAL_NAMES)
        own = (n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__)
        defined = sorted({*own, *(n for n in found if hasattr(module, n))})
        raise ValueError(
            f"reward.path: {path} needs {wanted}; it defines {', '.join(defined) or 'no function'}. "
            "Name the function with reward.name."
        )
    return recognise(getattr(module, found[0]), found[0], path)


def recognise(function: Callable[..., Any], name: str, path: Path) -> RewardFunction:
    """Tell the form of a function by the names of its parameters; ValueError if it is neither."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code else str(path)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        signature = None
    origin = f"{where}: {name}{signature if signature else '(unknown signature)'}"
    if _is_async(function):
        raise ValueError(
            f"reward: {origin} is async. Reward functions are called synchronously, in batches: "
            "define it with `def`, and use asyncio.run inside it where it must await."
        )
    parameters = list(signature.parameters.values()) if signature else []
    by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes = frozenset(p.name for p in by_keyword)
    forms: list[Form] = []
    if "completions" in takes:
        forms.append("trl")
    if "queries" in takes:
        forms.append("openrlhf")
    if len(forms) != 1 or any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise ValueError(
            f"reward: {origin} has neither of the accepted forms:\n{BOTH_FORMS}\n"
            "They are told apart by the parameters `completions` and `queries`: name exactly one of them, "
            "none positional-only."
        )
    return RewardFunction(
        call=function,
        form=forms[0],
        origin=origin,
        file=code.co_filename if code else str(path),
        takes=takes,
        required=frozenset(p.name for p in by_keyword if p.default is p.empty),
        takes_any=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def as_scores(raw: Any, count: int, *, form: Form) -> list[Score | ScoreFailed]:
    """What a function returned, as one result a sample; anything but finite numbers is `invalid`."""
    if form == "openrlhf" and isinstance(raw, Mapping):
        if "rewards" not in raw:
            return [_invalid(f"a dict without 'rewards' (keys: {', '.join(map(str, raw)) or 'none'})")] * count
        raw = raw["rewards"]
    if inspect.isawaitable(raw):
        if inspect.iscoroutine(raw):
            raw.close()  # or Python warns that it was never awaited
        return [_invalid("an awaitable; the function must be synchronous")] * count
    values = _plain(raw)  # tensors and arrays, without importing torch or numpy
    if not isinstance(values, list | tuple):
        return [_invalid(f"{type(raw).__name__}, needed a list of {count} numbers")] * count
    if len(values) != count:
        return [_invalid(f"{len(values)} rewards for {count} samples")] * count
    return [_as_score(value) for value in values]


def user_traceback(error: BaseException, file: str) -> str:
    """The traceback from the user's file on (our own frames left out), cut to a readable length."""
    start = error.__traceback__
    while start is not None and start.tb_frame.f_code.co_filename != file:
        start = start.tb_next
    lines = traceback.format_exception(type(error), error, start, limit=-TRACEBACK_FRAMES, chain=False)
    text = "".join(lines).rstrip()
    return text if len(text) <= DETAIL_CHARS else text[: DETAIL_CHARS // 2] + "\n[...]\n" + text[-DETAIL_CHARS // 2 :]


def _plain(value: Any) -> Any:
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def _as_score(value: Any) -> Score | ScoreFailed:
    plain = _plain(value)
    if not isinstance(plain, numbers.Real):  # bool is a number: True is 1
        return _invalid(f"{type(value).__name__} {value!r:.80}, needed a finite number")
    try:
        number = float(plain)
    except OverflowError:
        return _invalid("a number too large for a float")
    return Score(number) if math.isfinite(number) else _invalid(f"{number}, needed a finite number")


def _invalid(what: str) -> ScoreFailed:
    return ScoreFailed("invalid", f"the reward function returned {what}")


def _is_async(function: Callable[..., Any]) -> bool:
    candidates = (function, inspect.unwrap(function), type(function).__call__)
    return any(inspect.iscoroutinefunction(c) or inspect.isasyncgenfunction(c) for c in candidates)


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Loads a source file and leaves no __pycache__ beside it."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """The documented hook that stores bytecode; storing none is allowed."""


def _load_module(path: Path) -> ModuleType:
    """Run the file once a process; unchanged files are not run again. sys.path stays as it is."""
    path = path.expanduser().absolute()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"reward.path: cannot read {path} ({error.strerror}). Needed: a Python file with the reward function; "
            "a relative path starts at the recipe's folder."
        ) from error
    # A name of its own for each file and content, so that no import can meet it and an edited file is run anew.
    digest = hashlib.sha256(str(path).encode(errors="surrogateescape") + b"\0" + source).hexdigest()[:16]
    name = f"lrscale_user_reward_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_SourceLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = "\nModules beside the file cannot be imported: install them, or put their folder on PYTHONPATH."
        raise ValueError(f"reward.path: {path} does not run:\n{user_traceback(error, str(path))}{hint}") from error
    return module
