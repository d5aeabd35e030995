"""Batched decoding: rows in discrete and in latent mode side by side in one step.

A step gives every row one position. A row in discrete mode samples a token; a row in latent mode
projects its hidden state; then one forward serves both. Finished rows leave the batch.

Legend: B rows decoded now, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lrscale.latent.backbone import Backbone
from lrscale.latent.expand import LatentMode, feed_rows, next_latents
from lrscale.latent.layout import pad_rows
from lrscale.latent.marker import MarkerDetector
from lrscale.latent.pace import Pace
from lrscale.latent.sampling import SamplingOptions, draw, row_streams, uniforms
from lrscale.latent.stream import LatentStream
from lrscale.records import LatentSpan, Rollout

_LATENT = -1
"""Stands for a latent position in the record of a row."""
_COMPACT_BELOW = 0.85
"""Finished rows are dropped once fewer than this share of the batch still decodes."""


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """Everything that decides what is decoded, besides the prompts."""

    max_new_tokens: int
    """Positions a completion may take: discrete tokens plus latent steps."""
    stop_ids: tuple[int, ...]
    min_new_tokens: int = 0
    """No stop token is drawn before so many positions."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    mode: LatentMode = "real"
    policy_version: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: given {self.max_new_tokens}, needed at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: given {self.min_new_tokens}, needed 0 to max_new_tokens ({self.max_new_tokens})"
            )
        if self.mode not in ("real", "zero", "shuffled"):
            raise ValueError(f"mode: given {self.mode!r}, allowed `real`, `zero` or `shuffled`")


class Decoder:
    """Decodes one batch of prompts; `run` yields each rollout as soon as it is finished."""

    def __init__(
        self, backbone: Backbone, projector: nn.Module, detector: MarkerDetector, options: DecodeOptions, pace: Pace
    ) -> None:
        self.backbone = backbone
        self.projector = projector
        self.detector = detector
        self.options = options
        self.pace = pace

    @torch.no_grad()
    def run(self, prompts: Sequence[Sequence[int]], row_keys: Sequence[int]) -> Iterator[tuple[int, Rollout]]:
        """Yield (index into `prompts`, rollout). `row_keys` name the rows' random streams.

        Where ranks keep pace, a rank whose rows have all finished decodes on without recording anything, until
        the last row of the last rank has.
        """
        batch = self._prefill(prompts, row_keys)
        (any_latent,) = self.pace.most(int((batch.remaining_B > 0).any()))
        options, device = self.options, self.backbone.device
        stop_ids = torch.tensor(options.stop_ids, dtype=torch.long, device=device)
        for position in range(options.max_new_tokens):
            latent_B = batch.remaining_B > 0
            tokens_B, logprobs_B = draw(
                self.backbone.head(batch.stream.hidden_BH),
                uniforms(batch.randoms_B, position),
                options.sampling,
                stop_ids if position < options.min_new_tokens else None,
            )
            stopped_B = torch.isin(tokens_B, stop_ids) & ~latent_B
            embeds_BH = self.backbone.embed(tokens_B)
            if any_latent:
                z_AH = next_latents(self.projector, batch.stream.hidden_BH, latent_B, options.mode)
                embeds_BH = embeds_BH.index_put((latent_B,), z_AH)
                batch.record_latents(latent_B, z_AH)
            batch.record(position, tokens_B.masked_fill(latent_B, _LATENT), logprobs_B)
            self._advance(batch, tokens_B, latent_B)
            last = position + 1 == options.max_new_tokens
            finished_B = batch.alive_B & (stopped_B | last)
            for slot in finished_B.nonzero().squeeze(1).tolist():
                yield batch.rollout(slot, position + 1, stopped=bool(stopped_B[slot]), options=options)
            batch.alive_B = batch.alive_B & ~finished_B
            batch.remaining_B = batch.remaining_B * batch.alive_B
            alive = int(batch.alive_B.sum())
            alive_anywhere, any_latent = self.pace.most(alive, int((batch.remaining_B > 0).any()))
            if not alive_anywhere:
                return
            least = 2 if options.mode == "shuffled" else 1  # a row alone has nobody to swap latents with
            if max(alive, least) < _COMPACT_BELOW * len(batch.alive_B):
                kept = torch.argsort(~batch.alive_B, stable=True)[: max(alive, least)]
                batch.keep(kept)
                embeds_BH = embeds_BH[kept]
            batch.stream.feed(embeds_BH[:, None])

    def _advance(self, batch: _Batch, tokens_B: Tensor, latent_B: Tensor) -> None:
        """Move the marker automaton over the tokens just drawn; latent rows count down instead."""
        batch.states_B, batch.remaining_B = self.detector.follow(batch.states_B, batch.remaining_B, tokens_B, latent_B)
        if self.options.mode == "zero":
            batch.remaining_B = torch.zeros_like(batch.remaining_B)

    def _prefill(self, prompts: Sequence[Sequence[int]], row_keys: Sequence[int]) -> _Batch:
        """Run each distinct prompt once, latents behind its markers included, then give every row its copy."""
        distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=self.backbone.device)
        packed = pad_rows(distinct, self.backbone.device)
        states, spans, pending = zip(*(self._scan(prompt) for prompt in distinct), strict=True)
        stream = LatentStream(self.backbone, len(distinct))
        fed = feed_rows(stream, self.projector, packed, spans, self.options.mode, self.pace)
        stream.keep(rows)
        device = self.backbone.device
        return _Batch.begin(
            [tuple(prompt) for prompt in prompts],
            [(spans[row], fed.latents[row]) for row in rows.tolist()],
            stream,
            (
                row_streams(self.options.seed, row_keys, device),
                torch.tensor(states, device=device)[rows],
                torch.tensor(pending, device=device)[rows],
            ),
            self.options.max_new_tokens,
        )

    def _scan(self, prompt: tuple[int, ...]) -> tuple[int, tuple[LatentSpan, ...], int]:
        """Automaton state behind a prompt, the runs inside it, and the steps of a marker that ends it."""
        state, spans = self.detector.initial_state, []
        for position, token in enumerate(prompt):
            state, steps = self.detector.advance_one(state, token)
            if steps and self.options.mode != "zero":
                spans.append(LatentSpan(position, steps))
        pending = spans.pop().steps if spans and spans[-1].position == len(prompt) - 1 else 0
        return state, tuple(spans), pending


@dataclass(slots=True)
class _Batch:
    """The rows that still decode, and the records of all rows of the batch."""

    prompts: list[tuple[int, ...]]
    prompt_latents: list[tuple[tuple[LatentSpan, ...], list[Tensor]]]
    """Runs inside each prompt and their latents."""
    stream: LatentStream
    randoms_B: Tensor
    """Random stream of each row."""
    states_B: Tensor
    """Where the marker automaton stands."""
    remaining_B: Tensor
    """Latent steps still to take; above 0 a row is in latent mode."""
    row_B: Tensor
    """Which row of the batch each slot decodes."""
    alive_B: Tensor
    tokens: Tensor
    """[rows, positions] drawn tokens, `_LATENT` at latent steps."""
    logprobs: Tensor
    latents: list[list[Tensor]]

    @classmethod
    def begin(
        cls,
        prompts: list[tuple[int, ...]],
        prompt_latents: list[tuple[tuple[LatentSpan, ...], list[Tensor]]],
        stream: LatentStream,
        columns: tuple[Tensor, Tensor, Tensor],
        max_new_tokens: int,
    ) -> _Batch:
        """All rows alive, nothing recorded; `columns` are random streams, automaton states, steps to take."""
        rows, device = len(prompts), columns[0].device
        dtype = torch.float64 if stream.backbone.dtype == torch.float64 else torch.float32
        return cls(
            prompts,
            prompt_latents,
            stream,
            *columns,
            row_B=torch.arange(rows, device=device),
            alive_B=torch.ones(rows, dtype=torch.bool, device=device),
            tokens=torch.full((rows, max_new_tokens), _LATENT, dtype=torch.long, device=device),
            logprobs=torch.zeros(rows, max_new_tokens, dtype=dtype, device=device),
            latents=[list(latents) for _, latents in prompt_latents],
        )

    def record(self, position: int, tokens_B: Tensor, logprobs_B: Tensor) -> None:
        self.tokens[self.row_B, position] = tokens_B
        self.logprobs[self.row_B, position] = logprobs_B.to(self.logprobs.dtype)

    def record_latents(self, latent_B: Tensor, z_AH: Tensor) -> None:
        for row, z_H in zip(self.row_B[latent_B].tolist(), z_AH.unbind(0), strict=True):
            self.latents[row].append(z_H)

    def keep(self, kept: Tensor) -> None:
        self.stream.keep(kept)
        self.randoms_B, self.states_B, self.remaining_B = (
            column[kept] for column in (self.randoms_B, self.states_B, self.remaining_B)
        )
        self.row_B, self.alive_B = self.row_B[kept], self.alive_B[kept]

    def rollout(self, slot: int, length: int, *, stopped: bool, options: DecodeOptions) -> tuple[int, Rollout]:
        """The finished rollout of the row in `slot`, `length` positions long."""
        row = int(self.row_B[slot])
        prompt, (prompt_spans, _) = self.prompts[row], self.prompt_latents[row]
        record = self.tokens[row, :length].tolist()
        discrete = [position for position, token in enumerate(record) if token != _LATENT]
        latents = self.latents[row]
        hidden_size = self.stream.backbone.hidden_size
        empty = torch.zeros(0, hidden_size, dtype=self.stream.backbone.dtype)
        return row, Rollout(
            prompt_ids=prompt,
            completion_ids=tuple(record[position] for position in discrete),
            logprobs_T=self.logprobs[row, discrete].cpu(),
            latent_spans=(*prompt_spans, *_completion_spans(record, len(prompt))),
            latents_LH=torch.stack(latents).cpu() if latents else empty,
            policy_version=options.policy_version,
            stop_reason="stop" if stopped else "length",
        )


def _completion_spans(record: Sequence[int], prompt_length: int) -> list[LatentSpan]:
    """Runs of latent positions in a record, each at the token before it."""
    spans: list[LatentSpan] = []
    position = prompt_length - 1
    run = 0
    for token in (*record, None):
        if token == _LATENT:
            run += 1
            continue
        if run:
            spans.append(LatentSpan(position, run))
            run = 0
        position += 1
    return spans
