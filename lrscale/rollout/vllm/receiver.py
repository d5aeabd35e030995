"""The worker's end of a publication: vLLM mixes this class into its own worker (`worker_extension_cls`)."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

from lrscale.keeper import die_with_parent
from lrscale.rollout.vllm.plugin import register
from lrscale.rollout.vllm.worker import LatentWorker
from lrscale.rollout.weight_files import ReadFiles
from lrscale.rollout.weight_group import Invitation, WeightGroup
from lrscale.rollout.weight_stream import ReceivedStream
from lrscale.rollout.weights import Incoming, PublicationError

register()  # vLLM imports this before it builds the model, also where the plugin's entry point is not installed


class ServedWorker(LatentWorker):
    """Called by name through `collective_rpc`; every worker of an engine does the same."""

    rank: int
    device: Any
    lrscale_group: WeightGroup | None = None

    def end_with_server(self) -> int:
        """This process ends with the one that started it, by whatever signal that one ends; its process id."""
        die_with_parent()
        return os.getpid()

    def join_group(self, invitation: dict[str, Any]) -> int | str:
        """Become a member of the trainer's group for weights: this worker's number, or why it cannot."""
        if self.lrscale_group is not None:
            self.lrscale_group.close()
            self.lrscale_group = None
        invited = Invitation(**invitation)
        try:
            self.lrscale_group = WeightGroup.join(invited, self.rank, self.device)
        except (OSError, RuntimeError) as error:
            return f"worker {self.rank} cannot join the trainer at {invited.host}: {error}"
        return self.lrscale_group.number

    def receive_weights(self, source: dict[str, str], version: int, projector_only: bool) -> int | str:  # noqa: FBT001
        """Load a publication from {manifest: path} or {group: token}; the version that this worker has now.

        Or, in words, why not: another version than announced, or damaged buckets. Of files nothing was loaded then.
        """
        incoming: Incoming | None = None
        try:
            incoming = self._incoming(source)
            incoming.expect(version, projector_only=projector_only)
            self.lrscale_version = -1
            self.reload(incoming.tensors(), projector_only=projector_only)
            incoming.finish()
        except Exception as error:  # noqa: BLE001 - an answer like any other: see EngineDesk
            traceback.print_exc()
            words = str(error) if isinstance(error, PublicationError) else f"{type(error).__name__}: {error}"
            if incoming is not None:
                incoming.refuse(words)
            return words
        self.lrscale_version = version
        return version

    def _incoming(self, source: dict[str, str]) -> Incoming:
        if "manifest" in source:
            return ReadFiles(Path(source["manifest"]))
        if self.lrscale_group is None or self.lrscale_group.token != source["group"]:
            raise PublicationError(f"weights: worker {self.rank} is not in the group {source['group']}")
        return ReceivedStream(self.lrscale_group)

    def name_version(self, version: int) -> int:
        """The weights that are there stand for this version too."""
        self.lrscale_version = version
        return version
