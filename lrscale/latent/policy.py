"""LatentPolicy: any causal LM of transformers, with a Reasoning Projector beside it.

Legend: B rows, T tokens, L latent steps, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lrscale.latent.backbone import Backbone, disable_dropout
from lrscale.latent.decode import Decoder
from lrscale.latent.expand import LatentMode, expand_rows
from lrscale.latent.generation import Generation, decode_options, even_batches
from lrscale.latent.hf_layout import (
    ProjectorFields,
    dtype_of,
    load_base,
    load_projector_tensors,
    save_config,
    save_weights,
)
from lrscale.latent.layout import PackedRows, Spans, gather_positions, pack_rows
from lrscale.latent.marker import MarkerDetector
from lrscale.latent.marker_tokens import ensure_marker_tokens
from lrscale.latent.pace import ALONE, Pace
from lrscale.latent.prefix import spans_behind, stream_behind
from lrscale.latent.projector import ProjectorKind, ReasoningProjector
from lrscale.latent.replay import fit_spans, projector_inputs, replay_rows
from lrscale.latent.stream import LatentStream
from lrscale.records import Rollout, SharedPrefix

DEFAULT_PROJECTOR_LAYERS = 3
DEFAULT_MAX_LATENT_STEPS = 32


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """A forward over sequences with latents, aligned with their tokens: row t predicts token t+1."""

    hidden_BTH: Tensor
    """[B, T, H] what the LM head reads; at a marker's last token it is the last latent's. Junk at padding."""
    latents: tuple[Tensor, ...]
    """One [L, H] tensor a row."""
    spans: tuple[Spans, ...]
    """Latent runs a row; positions count the row's real tokens."""
    head: Callable[[Tensor], Tensor]

    @property
    def logits_BTV(self) -> Tensor:
        """[B, T, V] all at once; `LatentPolicy.token_logprobs` is the way that bounds memory."""
        return self.head(self.hidden_BTH)


class LatentPolicy(nn.Module):
    """A causal LM that reasons partly in latent space (method, sections 2 to 5).

    Knows no ranks and no files beyond its own checkpoint. Dropout is switched off for good.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        projector: ReasoningProjector,
        *,
        max_latent_steps: int = DEFAULT_MAX_LATENT_STEPS,
        logits_mib: int = 256,
    ) -> None:
        super().__init__()
        if max_latent_steps < 1:
            raise ValueError(f"max_latent_steps: given {max_latent_steps}, needed at least 1")
        self.model = model
        self.reasoning_projector = projector
        self.tokenizer = tokenizer
        self.max_latent_steps = max_latent_steps
        self.logits_mib = logits_mib
        self.pace: Pace = ALONE
        """Where parameters are sharded: how many forwards the other ranks run."""
        self.backbone = Backbone(model)
        self.detector = MarkerDetector(tokenizer, max_latent_steps)
        disable_dropout(self)
        self.eval()

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - the public constructor: everything but the path has a default
        cls,
        path_or_model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        projector_layers: int | None = None,
        max_latent_steps: int | None = None,
        *,
        projector_kind: ProjectorKind | None = None,
        dtype: str | torch.dtype | None = None,
        attention: str | None = None,
        add_marker_tokens: bool = False,
    ) -> LatentPolicy:
        """Load a LiteReason checkpoint, or a plain model with a projector warm-started from its last MLP.

        Args:
            path_or_model: hub id, local folder, or a model that is already loaded.
            tokenizer: taken from the path where it is None.
            projector_layers: None means the checkpoint's, 3 for a plain model.
            max_latent_steps: None means the checkpoint's, 32 for a plain model.
            projector_kind: None means the checkpoint's, `paper` for a plain model.
            dtype: None leaves the checkpoint's.
            attention: `sdpa`, the default, or `eager`; paths only.
            add_marker_tokens: give each tag a token of its own where the tokenizer has none. Their embeddings start
                as the mean of the pieces that spelled them; a marker then takes 3 tokens or so instead of 10.

        Raises:
            ValueError: no tokenizer, no MLP to clone, a projector other than the one asked for, or an option that
                does not apply to a model that is already loaded.
        """
        if isinstance(path_or_model, PreTrainedModel):
            model, path, fields = path_or_model, None, None
            if tokenizer is None:
                raise ValueError("a loaded model needs its tokenizer beside it: from_pretrained(model, tokenizer)")
            if dtype is not None or attention is not None:
                raise ValueError("dtype and attention are for paths: load the model with the ones you want")
            if ProjectorFields.read(model.config) is not None:
                raise ValueError(
                    "the loaded model is a LiteReason checkpoint: hand in its path to get its projector too"
                )
        else:
            path = str(path_or_model)
            fields = ProjectorFields.read(AutoConfig.from_pretrained(path, trust_remote_code=False))
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = load_base(path, dtype=dtype_of(dtype) or "auto", attn_implementation=attention or "sdpa")
        if add_marker_tokens:
            ensure_marker_tokens(model, tokenizer)
        wanted = _wanted_fields(fields, projector_layers, max_latent_steps, projector_kind)
        backbone = Backbone(model)
        projector = ReasoningProjector.from_mlp(
            backbone.last_mlp(),
            layers=wanted.layers,
            hidden_size=backbone.hidden_size,
            kind=wanted.kind,
            embedding_rms=backbone.embedding_rms(),
        )
        if fields is not None:
            projector.load_state_dict(load_projector_tensors(path))
        return cls(model, tokenizer, projector, max_latent_steps=wanted.max_latent_steps)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, projector, config and tokenizer in the Hugging Face layout."""
        self.save_config(Path(folder))
        save_weights(self.model, self.projector, Path(folder))

    @property
    def projector_fields(self) -> ProjectorFields:
        """What a checkpoint's config says of the projector."""
        return ProjectorFields(len(self.projector), self.max_latent_steps, self.projector.kind)

    def save_config(self, folder: Path) -> None:
        """Everything but the weights: config, generation config, tokenizer."""
        save_config(self.model, self.projector_fields, folder)
        self.tokenizer.save_pretrained(folder)

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass, layer by layer.

        What is recomputed is not compared with what was saved: under ZeRO-3 a frozen weight is released again by
        then, and its shape is no longer the same (DeepSpeed #8130).
        """
        options = {"use_reentrant": False, "determinism_check": "none"}
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    @property
    def projector(self) -> ReasoningProjector:
        return self.reasoning_projector

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the generation config's, else the tokenizer's."""
        config = self.model.generation_config
        eos = config.eos_token_id if config is not None and config.eos_token_id is not None else None
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)

    def encode(self, text: str, *, chat_template: bool = False) -> list[int]:
        """Token ids of a prompt, special tokens as the tokenizer adds them."""
        if not chat_template:
            return list(self.tokenizer.encode(text))
        message = [{"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))

    def marker_ids(self, steps: int) -> list[int]:
        """Token ids of the marker that asks for `steps` latent steps."""
        return list(self.detector.marker_ids(steps))

    def expand(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        mode: LatentMode = "real",
        prefix: SharedPrefix | None = None,
    ) -> TokenOutput:
        """Recompute all latents in order; differentiable through the whole chain (method, section 5).

        Rows may be padded on either side; the attention mask alone says what is padding. With `prefix` they go on
        behind what they share, which is run once; what comes back is about their own tokens. With gradients that is
        for whole weights: FSDP2 does not bring a layer back for a gradient that reaches its keys and values alone.
        """
        packed = self._packed(input_ids_BT, attention_mask_BT)
        spans = self._spans(packed, mode, prefix)
        self.backbone.check_positions(_positions(packed, spans, prefix))
        stream = LatentStream(self.backbone, len(spans))
        if prefix is not None:
            stream = stream_behind(self.backbone, prefix, in_pieces=False)
        hidden_BTH, latents = expand_rows(stream, self.projector, packed, spans, mode, self.pace)
        return self._output(hidden_BTH, latents, spans, packed)

    def replay(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        latents: Sequence[Tensor],
        mode: LatentMode = "real",
        prefix: SharedPrefix | None = None,
    ) -> TokenOutput:
        """One forward with recorded latents as constants: one [L, H] tensor a row, in order. `prefix` as in `expand`.

        Raises:
            ValueError: a row's latents do not fit its markers (a run cut by a length limit at the end fits).
        """
        packed = self._packed(input_ids_BT, attention_mask_BT)
        spans = fit_spans(self._spans(packed, mode, prefix), packed.lengths_B, latents)
        self.backbone.check_positions(_positions(packed, spans, prefix))
        stream = stream_behind(self.backbone, prefix, in_pieces=True) if prefix else None
        hidden_BTH = replay_rows(self.backbone, packed, spans, latents, stream)
        return self._output(hidden_BTH, tuple(latents), spans, packed)

    def projector_inputs(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, latents: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """[L, H] a row: with `latents` replayed, the hidden states that the projector reads to make each of them."""
        packed = self._packed(input_ids_BT, attention_mask_BT)
        spans = fit_spans(self._spans(packed, "real"), packed.lengths_B, latents)
        return projector_inputs(self.backbone, packed, spans, latents)

    def token_logprobs(
        self,
        hidden_BTH: Tensor,
        input_ids_BT: Tensor,
        temperature: float = 1.0,
        where_BT: Tensor | None = None,
    ) -> Tensor:
        """log p(token t | before t) of every token, [B, T]; 0 in column 0 and where `where_BT` is 0.

        The LM head runs in chunks, recomputed in the backward pass, so that a copy of the logits never takes
        more than `logits_mib` MiB (counted in float32, float64 for a float64 policy; two or three copies
        live at once). Tokens must not be left-padded here: column t is predicted from column t-1.
        """
        input_ids_BT = input_ids_BT.to(hidden_BTH.device)
        wanted_BT = torch.ones_like(input_ids_BT, dtype=torch.bool)
        if where_BT is not None:
            wanted_BT &= where_BT.to(hidden_BTH.device).bool()
        wanted_BT[:, 0] = False
        hidden_NH = hidden_BTH[:, :-1][wanted_BT[:, 1:]]
        targets_N = input_ids_BT[wanted_BT]
        wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        chunk = max(1, self.logits_mib * 2**20 // (self.backbone.vocabulary * wide.itemsize))

        def chunk_logprobs(hidden_CH: Tensor, targets_C: Tensor) -> Tensor:
            logits_CV = self.backbone.head(hidden_CH).to(wide) / (temperature or 1.0)
            return logits_CV.gather(1, targets_C[:, None]).squeeze(1) - logits_CV.logsumexp(-1)

        chunks = list(zip(hidden_NH.split(chunk), targets_N.split(chunk), strict=True))
        (most_chunks,) = self.pace.most(len(chunks))
        chunks += [(hidden_NH[:0], targets_N[:0])] * (most_chunks - len(chunks))
        pieces = [
            checkpoint(chunk_logprobs, hidden_CH, targets_C, use_reentrant=False, determinism_check="none")
            if torch.is_grad_enabled()
            else chunk_logprobs(hidden_CH, targets_C)
            for hidden_CH, targets_C in chunks
        ]
        logprobs_BT = hidden_BTH.new_zeros(input_ids_BT.shape, dtype=wide)
        return logprobs_BT.masked_scatter(wanted_BT, torch.cat(pieces)) if pieces else logprobs_BT

    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Unpack[Generation]
    ) -> list[Rollout]:
        """Sample one completion a prompt, in the order of the prompts. Options as in `Generation`."""
        rollouts = dict(self.iter_generate(prompts, **options))
        return [rollouts[index] for index in range(len(rollouts))]

    def iter_generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Unpack[Generation]
    ) -> Iterator[tuple[int, Rollout]]:
        """Yield (index of the prompt, rollout) as sequences finish. Prompts are texts or token ids.

        Raises:
            ValueError: an option out of its range, an empty prompt, or more positions than the model has.
        """
        ids = [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        keys = list(options.get("row_keys") or range(len(ids)))
        batch_rows = options.get("batch_rows", 256)
        if len(keys) != len(ids):
            raise ValueError(f"row_keys: {len(keys)} given for {len(ids)} prompts")
        if batch_rows < 1:
            raise ValueError(f"batch_rows: given {batch_rows}, needed at least 1")
        for index, prompt in enumerate(ids):
            if not prompt:
                raise ValueError(f"prompt {index} has no tokens")
        decoding = decode_options(options, self.stop_ids)
        inside = (sum(span.steps for span in self.detector.find(prompt)) for prompt in ids)
        positions = max((len(prompt) + steps for prompt, steps in zip(ids, inside, strict=True)), default=0)
        self.backbone.check_positions(positions + decoding.max_new_tokens)
        decoder = Decoder(self.backbone, self.projector, self.detector, decoding, self.pace)
        least = 2 if decoding.mode == "shuffled" else 1
        batches = even_batches(len(ids), batch_rows, least=least)
        (most_batches,) = self.pace.most(len(batches))
        for batch in batches:
            for index, rollout in decoder.run(ids[batch], keys[batch]):
                yield batch.start + index, rollout
        for _ in range(most_batches - len(batches)):
            for _ in decoder.run([[0]] * least, range(least)):
                pass  # other ranks have one more batch: their forwards need this rank's part of the weights

    def scale_ratio(self, latents: Sequence[Tensor] | Tensor, embedding_rms: float | None = None) -> float:
        """rms(latent) / rms(embedding): near 1 where latents look like inputs; nan without latents.

        `embedding_rms` saves a look at the embeddings, which sharded policies take on all ranks or none.
        """
        rows = [latents] if isinstance(latents, Tensor) else [row for row in latents if len(row)]
        if not rows:
            return float("nan")
        squares = torch.cat([row.detach().float().pow(2).flatten() for row in rows])
        return squares.mean().sqrt().item() / (embedding_rms or self.backbone.embedding_rms())

    def _packed(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> PackedRows:
        return pack_rows(input_ids_BT.to(self.device), attention_mask_BT.to(self.device))

    def _spans(self, packed: PackedRows, mode: LatentMode, prefix: SharedPrefix | None = None) -> list[Spans]:
        if mode == "zero":
            return [()] * packed.ids_BT.shape[0]
        if prefix is not None:
            return spans_behind(self.detector, prefix, packed)
        columns = torch.arange(packed.ids_BT.shape[1], device=packed.ids_BT.device)
        found = self.detector.find_batch(packed.ids_BT, (columns < packed.lengths_B[:, None]).long())
        return [tuple(spans) for spans in found]

    def _output(
        self, hidden_BTH: Tensor, latents: tuple[Tensor, ...], spans: Sequence[Spans], packed: PackedRows
    ) -> TokenOutput:
        """Back from right-packed tokens to the columns of the input."""
        columns = torch.arange(packed.ids_BT.shape[1], device=packed.ids_BT.device)
        right_padded = (packed.rank_BT == columns) | (columns >= packed.lengths_B[:, None])
        if not right_padded.all():
            hidden_BTH = gather_positions(hidden_BTH, packed.rank_BT)
        return TokenOutput(hidden_BTH, latents, tuple(spans), self.backbone.head)


def _positions(packed: PackedRows, spans: Sequence[Spans], prefix: SharedPrefix | None = None) -> int:
    """Longest row in positions, latents and what is in front of it included."""
    before_B = prefix.lengths_B if prefix else (0,) * len(spans)
    lengths = zip(packed.lengths_B.tolist(), spans, before_B, strict=True)
    return max(n + before + sum(span.steps for span in row) for n, row, before in lengths)


def _wanted_fields(
    found: ProjectorFields | None, layers: int | None, max_latent_steps: int | None, kind: ProjectorKind | None
) -> ProjectorFields:
    """What the caller asked for, completed by the checkpoint's own or the defaults; conflicts are refused."""
    if found is None:
        return ProjectorFields(
            DEFAULT_PROJECTOR_LAYERS if layers is None else layers,
            DEFAULT_MAX_LATENT_STEPS if max_latent_steps is None else max_latent_steps,
            kind or "paper",
        )
    if layers not in (None, found.layers) or kind not in (None, found.kind):
        raise ValueError(
            f"the checkpoint holds a `{found.kind}` projector of {found.layers} blocks, "
            f"asked for: `{kind or found.kind}` of {layers or found.layers}; "
            "leave both out, or start from the plain base model"
        )
    return ProjectorFields(found.layers, max_latent_steps or found.max_latent_steps, found.kind)
