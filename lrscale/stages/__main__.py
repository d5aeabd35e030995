"""python -m lrscale.stages MODULE ARGUMENTS: the main of a stage module, quiet when it is stopped early.

Loading torch takes seconds, in which a Ctrl-C would end in a traceback through somebody's imports.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import warnings
from types import FrameType

MODULES = ("worker", "evaluate", "generate", "replay-step", "export", "preflight", "score", "serve", "serve-rollouts")
INTERRUPTED = 130


def main() -> int:
    """Returns the exit code of the module."""
    if len(sys.argv) < 2 or sys.argv[1] not in MODULES:
        print(f"usage: python -m lrscale.stages {'|'.join(MODULES)} ARGUMENTS", file=sys.stderr)
        return 2
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # nohup and the like
        signal.signal(signal.SIGINT, _leave)
    gc.disable()  # nothing that is imported is garbage: to look for some takes a sixth of the time
    module = importlib.import_module(f"lrscale.stages.{sys.argv[1].replace('-', '_')}")
    gc.enable()
    signal.signal(signal.SIGINT, before)
    warnings.filterwarnings("default", category=UserWarning)
    try:
        return module.main(sys.argv[2:])
    except KeyboardInterrupt:
        return INTERRUPTED


def _leave(number: int, frame: FrameType | None) -> None:
    # An exception could be swallowed, or shown, by whatever is being imported.
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
