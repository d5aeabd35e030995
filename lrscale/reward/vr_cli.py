"""VR-CLI (arXiv 2503.22828): how much the reasoning helps a frozen generator to foresee the gold continuation.

    reward = 100 x (ppl_base - ppl_with) / ppl_base

ppl: perplexity of the gold continuation's tokens behind the story so far, without (base) and with the reasoning.
The base is the same for all samples of a datapoint: computed once and kept on disk. One sequence a forward, so a
score hangs on nothing but its sample.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrscale.records import Score, ScoreFailed
from lrscale.reward.models import ModelPlace, load
from lrscale.reward.source import CallNeeds, Needs, Result, Sample

STORY, GOLD = "story_so_far", "next_chapter"
"""Columns of the data."""
_MARKER = re.compile(r"<implicit_thought>\d+</implicit_thought>")
_BRIDGE = "\n\nWhat comes next:\n"
_GAP = "\n\n"


@dataclass(frozen=True, slots=True)
class VrCliSpec:
    """The frozen generator, and where base perplexities are kept."""

    model: ModelPlace
    max_tokens: int
    cache: str

    def open(self) -> VrCli:
        from transformers import AutoModelForCausalLM

        model, tokenizer = load(AutoModelForCausalLM, self.model)
        return VrCli(model, tokenizer, self, _stamp(self.model))


class VrCli:
    """Scores reasonings by perplexities."""

    def __init__(self, model: Any, tokenizer: Any, spec: VrCliSpec, stamp: str) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._spec = spec
        self._stamp = stamp
        self._base: dict[str, float] = {}

    def needs(self) -> Needs:
        return Needs((CallNeeds("reward.kind vr_cli", frozenset(), frozenset({STORY, GOLD})),))

    def score(self, samples: Sequence[Sample]) -> list[Result]:
        return [self._score(sample) for sample in samples]

    def perplexity(self, context: str, continuation: str) -> float:
        """exp of the mean negative log-likelihood of the continuation's tokens. ValueError where it does not fit."""
        import torch

        before = self._tokenizer(context)["input_ids"]
        after = self._tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not before or not after:
            raise ValueError("no tokens to read, or none to foresee")
        if len(before) + len(after) > self._spec.max_tokens:
            raise ValueError(
                f"{len(before)} tokens of context and {len(after)} of continuation; "
                f"reward.max_tokens allows {self._spec.max_tokens}"
            )
        ids_BT = torch.tensor([[*before, *after]], device=self._model.device)
        with torch.no_grad():
            out = self._model(input_ids=ids_BT, logits_to_keep=len(after) + 1, use_cache=False)
        logprobs_TV = out.logits[0, :-1].float().log_softmax(-1)
        picked_T = logprobs_TV.gather(1, ids_BT[0, -len(after) :, None]).double()
        return math.exp(-picked_T.mean().item())

    def _score(self, sample: Sample) -> Result:
        story, gold = str(sample.prompt.columns[STORY]), str(sample.prompt.columns[GOLD])
        reasoning = _MARKER.sub("", sample.completion).strip()
        try:
            base = self._base_perplexity(story, gold)
            found = self.perplexity(f"{story}{_BRIDGE}{reasoning}{_GAP}", gold) if reasoning else base
        except ValueError as error:
            return ScoreFailed("invalid", f"vr_cli: {error}")
        value = 100.0 * (base - found) / base
        if not math.isfinite(value):
            return ScoreFailed("invalid", f"vr_cli: perplexities {base} without and {found} with the reasoning")
        return Score(value, {"perplexity_base": base, "perplexity_with": found})

    def _base_perplexity(self, story: str, gold: str) -> float:
        """Of a datapoint: from memory, from disk, or computed and put there."""
        key = hashlib.sha256(json.dumps([self._stamp, story, gold]).encode()).hexdigest()
        if key not in self._base:
            path = Path(self._spec.cache) / key[:2] / f"{key}.json"
            value = _read(path)
            if value is None:
                value = self.perplexity(f"{story}{_GAP}", gold)
                _write(path, value)
            self._base[key] = value
        return self._base[key]


def _stamp(place: ModelPlace) -> str:
    """Changes with the generator: its path and numbers, and the files of a folder."""
    folder = Path(place.path)
    files = []
    if folder.is_dir():
        found = [path for path in folder.iterdir() if path.is_file()]
        files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found)
    return json.dumps([asdict(place), files])


def _read(path: Path) -> float | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads(path.read_text(encoding="utf-8"))["perplexity"])
    return None


def _write(path: Path, value: float) -> None:
    """Whole or not at all; several workers may do it at once. Without room the next one computes it again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"perplexity": value}), encoding="utf-8")
        temporary.replace(path)
