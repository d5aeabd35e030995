"""Runs the runtime on this machine, as a child process that has the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from lrscale.launch.errors import ExitCode

_KNOWN = frozenset(ExitCode)
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_module(module: str, arguments: Sequence[str], *, say: Callable[[str], None] = lambda text: None) -> int:
    """`python -m module arguments`, with this process's output and environment; returns its exit code for users.

    The child gets a process group of its own, so that a Ctrl-C reaches it once, by way of this process. The first
    one asks it to end, the second one kills it; checkpoints make both safe.

    Args:
        module: Name of a runtime module. "lrscale.stages" takes the name of a stage module as its first argument, and
            is quiet when it is stopped while torch is loaded.
        arguments: Its command line.
        say: Takes a line for people.
    """
    forwarder = _SignalForwarder(say)
    with forwarder.installed():
        forwarder.child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, process_group=0
        )
        code = forwarder.child.wait()
    # The kill that a second Ctrl-C asked for is no failure of the child.
    return ExitCode.INTERRUPTED if forwarder.killed and code == -signal.SIGKILL else exit_code(code)


def exit_code(returned: int) -> int:
    """A child's return code as one of ours: what it chose itself, 128 + signal, or 6 for anything unforeseen."""
    if returned < 0 and -returned in (signal.SIGINT, signal.SIGTERM):
        return 128 - returned
    if returned in _KNOWN or returned == 128 + signal.SIGTERM:
        return returned
    return ExitCode.RUN_FAILED


class _SignalForwarder:
    """Passes the signals of this process to the child."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.killed = False
        """A second signal killed the child."""
        self._say = say
        self._asked = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handlers for the time of the block. A signal that was ignored (nohup) stays ignored."""
        handlers = dict.fromkeys(_STOPPING, self._stop) | {signal.SIGTSTP: self._pause}
        former = {number: signal.getsignal(number) for number in handlers}
        taken = [number for number, before in former.items() if before is not signal.SIG_IGN]
        for number in taken:
            signal.signal(number, handlers[number])
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, former[number])

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked = True
            self._say("stopping (once more to kill)")
            if self.child is not None:
                self.child.send_signal(number)
        else:
            self.killed = True
            self._signal_group(signal.SIGKILL)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        # Ctrl-Z: the child stands outside the terminal's foreground group, so it is stopped and woken from here.
        self._signal_group(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_group(signal.SIGCONT)

    def _signal_group(self, number: int) -> None:
        if self.child is not None and self.child.poll() is None:
            os.killpg(self.child.pid, number)
