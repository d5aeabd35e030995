"""The latents of each request, kept in the worker until the trainer takes them.

A request's latents are known by their positions. Those that lie in its prompt may never be computed for it,
their KV blocks being found in the prefix cache; so latents are kept by KV block too, and a request that starts
behind cached blocks takes over what they hold.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lrscale.rollout.vllm.step import Step

_RANDOM_SUFFIX = 9
"""vLLM appends `-` and 8 random characters to the ids of requests."""
_REQUEST_BYTES = 1024
"""What a request without latents counts for."""


class LatentRecords:
    """Fed by the model's forward, one call a step; `runner` is vLLM's, which knows the requests of a step.

    At most `limit_bytes` of host memory are filled: beyond that the latents of the requests that have finished
    longest ago are dropped, and taking them is an error.
    """

    def __init__(self, runner: Any, folder: Path, latent_token_id: int, limit_bytes: int = 8 * 2**30) -> None:
        self.runner = runner
        self.folder = folder
        self.latent_token_id = latent_token_id
        self.limit_bytes = limit_bytes
        self._of_request: dict[str, dict[int, Tensor]] = {}
        self._of_block: dict[int, dict[int, Tensor]] = {}
        """Block -> place in it of the position before -> latent. An old content's latents are overwritten or not asked for."""
        self._incomplete: set[str] = set()
        self._held_bytes = 0
        self._files = 0

    def add(self, step: Step, rows: Tensor, latents: Tensor) -> None:
        """Note the latents that follow `rows` of a step, [rows, H], and the requests that are new in it."""
        request_ids = self.runner.input_batch.req_ids[: step.sequences]
        new = [(index, request) for index, request in enumerate(request_ids) if request not in self._of_request]
        for _, request in new:
            self._of_request[request] = {}
            self._held_bytes += _REQUEST_BYTES
        if len(rows):
            size = self.runner.cache_config.block_size
            sequences = torch.searchsorted(step.starts_R1, rows, right=True) - 1
            columns = torch.stack([sequences, step.positions_T[rows].long(), step.slots_T[rows]]).tolist()
            for sequence, position, slot, latent in zip(*columns, latents.cpu().unbind(0), strict=True):
                own = latent.clone()  # a view would keep the latents of the whole step alive
                self._of_block.setdefault(slot // size, {})[slot % size] = own
                self._note(request_ids[sequence], position + 1, own)
        for index, request in new:
            self._adopt(index, request)
        if self._held_bytes > self.limit_bytes:
            self._drop_finished()

    def take(self, request_ids: Sequence[str]) -> Path:
        """Move the latents of finished requests into a safetensors file: one [L, H] tensor a request id, in order of
        positions. There may be one more than steps were taken, at the end, where a request stopped early.

        Raises:
            ValueError: a request that never ran here, or whose latents are incomplete or were dropped.
        """
        internal = {name: name for name in self._of_request}
        internal |= {name[:-_RANDOM_SUFFIX]: name for name in self._of_request}
        tensors: dict[str, Tensor] = {}
        for request in request_ids:
            name = internal.get(request)
            if name is None or name in self._incomplete:
                raise ValueError(
                    f"the latents of request {request!r} are not to be had here: it "
                    + ("never ran, or they were dropped" if name is None else "began before they were recorded")
                    + "; let the trainer recompute them (expand)"
                )
            tensors[request] = self._stacked(self._of_request[name])
        for request in request_ids:
            self._forget(internal[request])
        self._files += 1
        path = self.folder / f"latents-{os.getpid()}-{self._files}.safetensors"
        unfinished = path.with_suffix(".partial")
        save_file(tensors, unfinished)
        unfinished.rename(path)
        return path

    def forget_blocks(self) -> None:
        """What blocks hold stems from weights that are no longer in use."""
        self._of_block.clear()

    def _note(self, request: str, position: int, latent: Tensor) -> None:
        if position not in self._of_request[request]:
            self._held_bytes += latent.nbytes
        self._of_request[request][position] = latent

    def _adopt(self, index: int, request: str) -> None:
        """Take over the latents of cached blocks in front of a request's first computed position."""
        batch, size = self.runner.input_batch, self.runner.cache_config.block_size
        first = int(batch.num_computed_tokens_cpu[index])
        if not first:
            return
        (blocks, *_) = self.runner.requests[request].block_ids
        cached_ids = np.asarray(batch.token_ids_cpu[index, : first + 1])
        for position in np.flatnonzero(cached_ids == self.latent_token_id).tolist():
            latent = self._of_block.get(blocks[(position - 1) // size], {}).get((position - 1) % size)
            if latent is None:
                self._incomplete.add(request)
                return
            self._note(request, position, latent)

    def _stacked(self, latents: dict[int, Tensor]) -> Tensor:
        if latents:
            return torch.stack([latents[position] for position in sorted(latents)])
        config = self.runner.model_config
        return torch.zeros(0, config.get_hidden_size(), dtype=config.dtype)

    def _forget(self, request: str) -> None:
        latents = self._of_request.pop(request)
        self._held_bytes -= _REQUEST_BYTES + sum(latent.nbytes for latent in latents.values())
        self._incomplete.discard(request)

    def _drop_finished(self) -> None:
        for request in [name for name in self._of_request if name not in self.runner.requests]:
            self._forget(request)
            if self._held_bytes <= self.limit_bytes:
                return
