"""What flows between the stages: frozen records, shapes in their names.

Axes: P prompts in a step, G samples a prompt, B rows, T tokens, S positions
(tokens and latents), L latent steps, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

StopReason = Literal["stop", "length"]
"""`stop`: a stop token was written; `length`: `max_new_tokens` positions were used up."""

FailureKind = Literal["timeout", "error", "invalid", "unavailable"]


class LatentSpan(NamedTuple):
    """A run of latent steps behind a marker."""

    position: int
    """Index, in prompt_ids + completion_ids, of the marker's last token: the run follows it."""
    steps: int
    """Latent steps really taken, 0 or more (fewer than the marker's number only where a limit cut the run)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task example, ready to be sent to the policy."""

    prompt_id: str
    """Stable and unique within its task and split; seeds the random streams of its samples."""
    text: str
    """What the policy reads, the chat template not yet applied."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Everything else of the row (`answer`, ...): handed to the reward as keyword columns."""


@dataclass(frozen=True, slots=True)
class Trace:
    """An explicit reasoning trace that earned a positive reward."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    reward: float


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled sequence, with everything needed to replay it exactly."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Discrete tokens only; ends with the stop token where stop_reason is `stop`."""
    logprobs_T: Tensor
    """[T] log-probability of each completion token when it was sampled (float32; float64 for a float64 policy)."""
    latent_spans: tuple[LatentSpan, ...]
    """All latent runs of the sequence in order, those behind markers of the prompt included."""
    latents_LH: Tensor
    """[L, H] latents in order, L = sum of the spans' steps: the input embeddings that were really used."""
    policy_version: int
    """Of the weights when sampling began."""
    stop_reason: StopReason
    version_end: int | None = None
    """Of the weights when it ended, where an engine of its own may have been given others meanwhile; else None."""
    trainer_logprobs_T: Tensor | None = None
    """[T] the same tokens' log-probabilities as the trainer computes them, where it made the latents (float32)."""

    @property
    def completion_latent_steps(self) -> int:
        """Latent steps that count towards the completion's length.

        A marker that ends the prompt starts its run in the completion, so it counts as well.
        """
        last_prompt_token = len(self.prompt_ids) - 1
        return sum(span.steps for span in self.latent_spans if span.position >= last_prompt_token)

    @property
    def length(self) -> int:
        """Positions the completion takes: discrete tokens plus latent steps."""
        return len(self.completion_ids) + self.completion_latent_steps


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one rollout; `parts` holds the terms it is made of, by name."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoreFailed:
    """No reward could be had: the sample is masked out and counted, never scored 0."""

    kind: FailureKind
    detail: str


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G samples of one prompt with their scores, in the same order."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score | ScoreFailed, ...]


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """What rows of a batch have in front of them, run once for all rows that have the same."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids of each different prefix; one may be empty. No marker ends in them."""
    of_row_B: tuple[int, ...]
    """Which prefix each row stands behind."""

    @classmethod
    def of(cls, prefixes_B: Sequence[tuple[int, ...]]) -> SharedPrefix:
        """From each row's own."""
        number = {ids: index for index, ids in enumerate(dict.fromkeys(prefixes_B))}
        return cls(tuple(number), tuple(number[ids] for ids in prefixes_B))

    @property
    def lengths_B(self) -> tuple[int, ...]:
        """Tokens in front of each row."""
        return tuple(len(self.ids[index]) for index in self.of_row_B)


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Rows of one update, right-padded; latents enter as constants."""

    input_ids_BT: Tensor
    """[B, T] prompt and completion tokens (int64), those of the shared prefix left out."""
    attention_mask_BT: Tensor
    """[B, T] 1 where a token is real; never derived from token ids (pad may equal eos)."""
    action_mask_BT: Tensor
    """[B, T] 1 at completion tokens that carry loss (float)."""
    old_logprobs_BT: Tensor
    """[B, T] rollout log-probability of the token at t; 0 where the action mask is 0."""
    advantages_B: Tensor
    """[B] advantage of the row, shared by its tokens."""
    latents: tuple[Tensor, ...]
    """One [L, H] tensor a row, as recorded by the rollout."""
    prefix: SharedPrefix | None = None
    """The part of the prompts that is run once for the samples of a prompt."""
