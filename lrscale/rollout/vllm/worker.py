"""Methods that the engine's client calls in vLLM's workers: `worker_extension_cls`, `collective_rpc`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lrscale.rollout.vllm.reload import reload_weights

WORKER_EXTENSION = "lrscale.rollout.vllm.worker.LatentWorker"


class LatentWorker:
    """Mixed into vLLM's worker, hence no state and no constructor of its own."""

    model_runner: Any

    def check_latent_steps(self) -> bool:
        """To be called once when the engine is up: checks what is relied upon of the runner, begins to record.

        Returns whether this worker records latents.

        Raises:
            IncompatibleVllm: vLLM is not as it is relied upon.
        """
        model = self.model_runner.get_model()
        model.attach(self.model_runner)
        return model.records is not None

    def take_latents(self, request_ids: Sequence[str]) -> str | None:
        """Path of a safetensors file with one [L, H] tensor a finished request; the caller deletes it.

        None from the ranks that do not record.

        Raises:
            ValueError: no latents of a request are to be had.
        """
        records = self.model_runner.get_model().records
        return None if records is None else str(records.take(request_ids))

    def reload(self, weights: Iterable[tuple[str, Tensor]], *, projector_only: bool) -> None:
        """For methods of classes made from this one: `reload_weights` of this worker."""
        reload_weights(self, weights, projector_only=projector_only)
