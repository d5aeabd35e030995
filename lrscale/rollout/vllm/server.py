"""One rollout engine: vLLM behind a small HTTP service, token ids in and token ids out.

    python -m lrscale.rollout.vllm.server CONFIG.json

CONFIG.json is what `lrscale.rollout.vllm.settings.EngineSettings` holds. The process writes its address to a file
once it listens, and ends when its owner does (lrscale.keeper). It starts without weights: the trainer publishes them.

Exit codes: 0 shut down, 2 usage, 6 it failed.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrscale.keeper import keep
from lrscale.rollout.vllm.settings import EngineSettings

if TYPE_CHECKING:
    import uvicorn

    from lrscale.rollout.vllm.desk import EngineDesk

FAILED = 6
_LOOKS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to end; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lrscale.rollout.vllm.server", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("config", type=Path, help="settings, as JSON")
    settings = EngineSettings.read(parser.parse_args(arguments).config)
    # stdin is a pipe that the owner holds. A role on a node of its own has none, and ends with its shell.
    lifeline = sys.stdin.fileno() if settings.lifeline else None
    try:
        return keep(lambda: serve(settings), lifeline=lifeline, when_orphaned=_remove_shared_memory)
    finally:
        Path(settings.address_file).unlink(missing_ok=True)


def _remove_shared_memory() -> None:
    """The owner's, which could not do it."""
    from lrscale.rollout.shared_memory import remove_orphans

    for _ in range(_LOOKS):
        if remove_orphans():
            return
        time.sleep(0.1)  # its pipe breaks a moment before it is gone


def serve(settings: EngineSettings) -> int:
    """Body of the process that is kept."""
    import uvicorn

    from lrscale.rollout.vllm.desk import EngineDesk
    from lrscale.rollout.vllm.routes import engine_app

    try:
        with settings.open_socket() as listener:
            desk = EngineDesk.start(settings)
            config = uvicorn.Config(engine_app(desk), log_level="warning", access_log=False, lifespan="off")
            server = uvicorn.Server(config)
            desk.on_shutdown = lambda: setattr(server, "should_exit", True)
            asyncio.run(_run(desk, server, settings, listener))
    except Exception:  # noqa: BLE001 - the log is all that the owner can read of it
        traceback.print_exc()
        return FAILED
    return 0


async def _run(desk: EngineDesk, server: uvicorn.Server, settings: EngineSettings, listener: socket.socket) -> None:
    try:
        await desk.settle()
        settings.announce(listener)
        await server.serve(sockets=[listener])
    finally:
        desk.close()


if __name__ == "__main__":
    sys.exit(main())
