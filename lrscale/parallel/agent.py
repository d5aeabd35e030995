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
    from lrscale.parallel.ranks import import_torch_quietly, name_launcher

    import_torch_quietly()
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

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
