"""vLLM's OpenAI-compatible server, with latent steps on.

    python -m lrscale.rollout.vllm.openai FOLDER ARGUMENTS

FOLDER is a prepared model; ARGUMENTS are vLLM's own. Latent positions are in no text: their id has none.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from lrscale.keeper import keep

_MODULE = "vllm.entrypoints.openai.api_server"
"""The command `vllm` looks for a distribution of that name, which a CPU build has not."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stdin, a pipe of the owner's, breaks; returns the exit code."""
    folder, *options = sys.argv[1:] if arguments is None else arguments
    return keep(lambda: serve(folder, options), lifeline=sys.stdin.fileno())


def serve(folder: str, options: Sequence[str]) -> int:
    """Body of the process that is kept."""
    from lrscale.rollout.vllm.plugin import register

    register()
    extension = "lrscale.rollout.vllm.receiver.ServedWorker"
    own = ["--worker-extension-cls", extension, "--middleware", "lrscale.rollout.vllm.refusals.RefuseForms"]
    sys.argv = [_MODULE, "--model", folder, *own, *options]
    runpy.run_module(_MODULE, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
