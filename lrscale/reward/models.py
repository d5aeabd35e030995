"""Models that score, loaded in a worker: a sequence classifier as the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrscale.records import ScoreFailed
from lrscale.reward.functions import as_scores
from lrscale.reward.source import Needs, Result, Sample

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """Which model, and where it runs."""

    path: str
    """Folder or hub id."""
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    """Of torch on the CPU; None leaves it torch's choice."""


@dataclass(frozen=True, slots=True)
class ClassifierSpec:
    """A sequence classifier with one output."""

    model: ModelPlace
    max_tokens: int

    def open(self) -> Classifier:
        from transformers import AutoModelForSequenceClassification

        model, tokenizer = load(AutoModelForSequenceClassification, self.model)
        labels = getattr(model.config, "num_labels", 1)
        if labels != 1:
            raise ValueError(
                f"reward.path: {self.model.path} has {labels} outputs, needed one: a reward model, not a classifier of kinds"
            )
        return Classifier(model, tokenizer, self.max_tokens)


class Classifier:
    """The value head's output for prompt + completion, rows side by side."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def needs(self) -> Needs:
        return Needs()

    def score(self, samples: Sequence[Sample]) -> list[Result]:
        """One forward for all rows that are short enough."""
        rows = [self._ids(sample) for sample in samples]
        fitting = [index for index, row in enumerate(rows) if 0 < len(row) <= self._max_tokens]
        results: list[Result] = [
            ScoreFailed(
                "invalid", f"{len(row)} tokens for the reward model; reward.max_tokens allows {self._max_tokens}"
            )
            for row in rows
        ]
        if fitting:
            values = as_scores(self._forward([rows[index] for index in fitting]).tolist(), len(fitting), form="trl")
            for index, value in zip(fitting, values, strict=True):
                results[index] = value
        return results

    def _ids(self, sample: Sample) -> list[int]:
        """As one user turn and one answer, where the model has a chat template."""
        text = sample.prompt.text + sample.completion
        if getattr(self._tokenizer, "chat_template", None):
            turns = [
                {"role": "user", "content": sample.prompt.text},
                {"role": "assistant", "content": sample.completion},
            ]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._tokenizer(text)["input_ids"]

    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[B] values. The head reads each row's last token, which it finds by the padding id: rows of one length
        go together, so that no row is padded and none is cut where a pad token is a real one."""
        import torch

        values = torch.zeros(len(rows), dtype=torch.float64)
        by_length: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(index)
        # Without a padding id of its own the head reads the last position of one row, so they go in one by one.
        alone = self._model.config.get_text_config().pad_token_id is None
        groups = [[index] for index in range(len(rows))] if alone else list(by_length.values())
        with torch.no_grad():
            for group in groups:
                ids_BT = torch.tensor([rows[index] for index in group], device=self._model.device)
                out = self._model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
                values[group] = out.logits[:, 0].double().cpu()
        return values


def load(family: Any, place: ModelPlace) -> tuple[Any, Any]:
    """Model in evaluation mode on its device, and its tokenizer. ValueError where there is none to load."""
    import torch
    from transformers import AutoTokenizer

    if place.threads:
        torch.set_num_threads(place.threads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.path)
        model = family.from_pretrained(place.path, dtype=getattr(torch, place.dtype))
    except OSError as error:
        raise ValueError(f"reward.path: {place.path} cannot be loaded: {error}") from error
    return model.to(place.device).eval().requires_grad_(False), tokenizer
