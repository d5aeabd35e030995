"""Training rows of the projector: traces with some sentences replaced by markers.

Traces are sampled from prompts WITHOUT the marker paragraph (the base shall reason explicitly), yet the
rows here carry the prompt WITH it: that is what the policy will have read when it writes markers in RL,
and the projector reads hidden states that depend on it. The base is frozen, so it learns nothing from
the mismatch. Rollouts of RL (a refresh) keep the prompt that they were sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrscale.config.stages import TracesConfig
from lrscale.latent import MarkerDetector
from lrscale.records import LatentSpan, Trace
from lrscale.stages.prompts import PromptBook
from lrscale.stages.randomness import generator, shuffled
from lrscale.stages.sentences import lite_traces


@dataclass(frozen=True, slots=True)
class LiteRow:
    """One sequence with markers, ready for `expand`."""

    prompt_id: str
    ids: tuple[int, ...]
    """Prompt and completion."""
    spans: tuple[LatentSpan, ...]
    """All latent runs of the row; a row of training has at least one."""
    replaced: tuple[tuple[int, ...], ...]
    """A span each: the ids of the sentence that the marker stands for, () where there is none to be known."""

    @property
    def positions(self) -> int:
        return len(self.ids) + sum(span.steps for span in self.spans)


def lite_rows(
    traces: Sequence[Trace], detector: MarkerDetector, config: TracesConfig, seed: int, *names: str | int
) -> list[LiteRow]:
    """Each trace once per ratio; a trace without a sentence to replace gives no row.

    `names` and the trace's index name its random stream.
    """
    rows: list[LiteRow] = []
    for index, trace in enumerate(traces):
        rng = generator(seed, *names, index)
        for lite in lite_traces(trace.completion_ids, detector, config, rng):
            ids = (*trace.prompt_ids, *lite.completion_ids)
            spans = tuple(detector.find(ids))
            inside_prompt = len(spans) - len(lite.replaced)
            rows.append(LiteRow(trace.prompt_id, ids, spans, (*[()] * inside_prompt, *lite.replaced)))
    return rows


def with_marker_prompts(traces: Sequence[Trace], book: PromptBook) -> list[Trace]:
    """The traces behind the prompts that tell of the marker (see the module's text)."""
    return [
        Trace(trace.prompt_id, book.ids(book.with_markers(trace.prompt_id)), trace.completion_ids, trace.reward)
        for trace in traces
    ]


def split_heldout(traces: Sequence[Trace], share: float, seed: int) -> tuple[list[Trace], list[Trace]]:
    """(training, held out), by prompt: no prompt is on both sides. One prompt alone is trained on."""
    prompt_ids = sorted({trace.prompt_id for trace in traces})
    count = min(max(1, round(share * len(prompt_ids))), len(prompt_ids) - 1)
    heldout = set(shuffled(prompt_ids, seed, "heldout")[:count])
    return (
        [trace for trace in traces if trace.prompt_id not in heldout],
        [trace for trace in traces if trace.prompt_id in heldout],
    )
