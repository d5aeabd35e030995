"""`accelerate launch` for one node, with our exit codes and without its tracebacks.

    python -m lrscale.parallel.agent ARGUMENTS-OF-ACCELERATE-LAUNCH

The ranks have the terminal and say themselves what went wrong; here is said only what a dead rank cannot say.
Exit codes: that of the rank that failed first, 6 where it was killed, 130 or 143 when this process was told to end.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from types import FrameType

FAILED, INTERRUPTED = 6, 130
_OWN_CODES = (2, 3, 4, 6, 7, 75, 130, 143)


def main(arguments: list[str]) -> int:
    """Start the ranks and wait for them; returns the exit code."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # nohup and the like
        signal.signal(signal.SIGINT, _leave)
    _import_torch_quietly()
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from lrscale.parallel.ranks import name_launcher

    signal.signal(signal.SIGINT, before)
    logging.disable(logging.CRITICAL)
    name_launcher()
    with tempfile.TemporaryDirectory(prefix="lrscale-") as folder:
        tempfile.tempdir = folder  # torchrun leaves its folder behind
        try:
            launch_command(launch_command_parser().parse_args(arguments))
        except ChildFailedError as error:
            return _code_of(error)
        except SignalException as error:
            return 128 + int(error.sigval)
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


def _import_torch_quietly() -> None:
    """Without C++ warnings in this process: the ranks that it starts keep theirs.

    Agents meet when their ranks are done, through a store that the first one holds. It may leave while the others
    still read its answer; each of them would end a sound run with a C++ stack of forty lines. Attempts to reach a host
    that does not answer yet are not told either: what comes of them is, and TORCH_CPP_LOG_LEVEL=INFO shows them.
    """
    environment, level = os.environ, "TORCH_CPP_LOG_LEVEL"  # noqa: TID251 - ranks.py imports torch: too late
    if level in environment:  # someone wants to see them
        return
    environment[level] = "ERROR"
    try:
        import torch  # noqa: F401 - it reads the variable now, and never again
    finally:
        del environment[level]


def _code_of(error: BaseException) -> int:
    """The exit code of the rank that failed first; the others were ended because of it."""
    # In the order in which they were found: time stamps are whole seconds.
    rank, failure = next(iter(error.failures.items()))  # type: ignore[attr-defined]
    code = int(failure.exitcode)
    if code < 0:
        name = signal.Signals(-code).name
        why = " (out of memory, if nobody sent it: see dmesg)" if -code == signal.SIGKILL else ""
        print(f"error: rank {rank} was killed by {name}{why}; the other ranks were ended", file=sys.stderr)
        return FAILED
    if code in _OWN_CODES:
        return code
    print(
        f"error: rank {rank} ended with exit code {code}, its log may say why; the other ranks were ended",
        file=sys.stderr,
    )
    return FAILED


def _leave(number: int, frame: FrameType | None) -> None:
    # An exception could be swallowed, or shown, by whatever is being imported.
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
