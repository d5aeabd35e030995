"""The worker's end of a publication: vLLM mixes this class into its own worker (`worker_extension_cls`)."""

from __future__ import annotations

import os
from pathlib import Path

from lrscale.keeper import die_with_parent
from lrscale.rollout.vllm.plugin import register
from lrscale.rollout.vllm.worker import LatentWorker
from lrscale.rollout.weights import Manifest, PublicationError, check_publication, read_publication

register()  # vLLM imports this before it builds the model, also where the plugin's entry point is not installed


class ServedWorker(LatentWorker):
    """Called by name through `collective_rpc`; every worker of an engine does the same."""

    def end_with_server(self) -> int:
        """This process ends with the one that started it, by whatever signal that one ends; its process id."""
        die_with_parent()
        return os.getpid()

    def receive_weights(self, manifest_path: str, version: int, projector_only: bool) -> int:  # noqa: FBT001 - RPC
        """Load a publication in files; the version that this worker has now.

        Raises:
            PublicationError: another version than announced, or damaged buckets: nothing was loaded.
        """
        path = Path(manifest_path)
        manifest = Manifest.read(path)
        if (manifest.version, manifest.projector_only) != (version, projector_only):
            raise PublicationError(
                f"weights: announced were version {version}{' of the projector' if projector_only else ''}, "
                f"{path} holds version {manifest.version}{' of the projector' if manifest.projector_only else ''}"
            )
        check_publication(manifest, path.parent)  # before any tensor of the model has moved
        self.lrscale_version = -1
        self.reload(read_publication(manifest, path.parent), projector_only=projector_only)
        self.lrscale_version = version
        return version

    def name_version(self, version: int) -> int:
        """The weights that are there stand for this version too."""
        self.lrscale_version = version
        return version
