"""One start of the job: its folder, its lock, its logs, and which rank speaks to the terminal."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lrscale.parallel.checkpoint import DamagedCheckpointWarning
from lrscale.parallel.ranks import Ranks
from lrscale.stages.run_log import logger

_MAIN_FIRST_S = 1.0


class LockedError(RuntimeError):
    """Another worker holds the run directory."""


def new_attempt(folder: Path) -> Path:
    """attempts/N for the next N, with `latest` pointing to it."""
    numbers = [int(path.name) for path in folder.glob("*") if path.name.isdigit()] if folder.is_dir() else []
    attempt_folder = folder / str(max(numbers, default=0) + 1)
    attempt_folder.mkdir(parents=True)
    link = folder / ".tmp-latest"
    link.unlink(missing_ok=True)
    link.symlink_to(attempt_folder.name)
    link.replace(folder / "latest")
    return attempt_folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run directory for this process; the system lets go of it however the process ends.

    Raises:
        LockedError: another process holds it; the message names it.
    """
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip()
            raise LockedError(
                f"{path.parent} is being run by another worker ({holder}); wait for it, or stop it and launch again"
            ) from None
        with suppress(OSError):  # a full disk: the lock holds all the same, only who has it is not said
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
        with suppress(OSError):
            file.truncate(0)


class Voice:
    """What this rank may say on the terminal: the main rank everything, the others that they failed."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._terminal: int | None = None
        """The terminal of a rank whose own stderr goes to its log."""

    def say(self, text: str) -> None:
        """For people, from the main rank; the others keep it for their logs."""
        if self._ranks.is_main:
            print(text, file=sys.stderr)
        else:
            logger.info(text)

    def fail(self, text: str, folder: Path) -> None:
        """Why the run ends. Of all ranks that fail in an attempt (`folder`) the first one is heard, the others log."""
        ranks = self._ranks
        if ranks.world_size > 1:
            logger.info(text)
            if not self._turn() or not _first(folder / "told"):
                return
            if not ranks.is_main and "rank " not in text:
                text = text.replace("error: ", f"error: rank {ranks.rank}: ", 1)
        if self._terminal is None:
            print(text, file=sys.stderr)
        else:
            os.write(self._terminal, f"{text}\n".encode())

    def _turn(self) -> bool:
        """The main rank comes first where all fail alike; false if the launcher ends this rank while it waits."""
        if self._ranks.is_main:
            return True
        try:
            time.sleep(_MAIN_FIRST_S)
        except KeyboardInterrupt:
            return False
        return True

    @contextmanager
    def hushed(self, log: Path) -> Iterator[None]:
        """On ranks other than the main one, whatever libraries print goes to the log, not eightfold to the terminal."""
        if self._ranks.is_main:
            yield
            return
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        self._terminal = kept[1]
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, number in zip(kept, (1, 2), strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            self._terminal = None


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Everything the run says goes to the file, Python's warnings too; the run's own warnings also to the terminal."""
    file = _LogFile(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    terminal = _TerminalHandler(logging.WARNING)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    captured = logging.getLogger("py.warnings")
    logging.captureWarnings(capture=True)
    to_file = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, DamagedCheckpointWarning):  # work is lost: not only the log has to say so
            logger.warning("%s", message)
        else:
            to_file(message, category, *place)

    warnings.showwarning = show
    logs = (logger, captured, logging.getLogger("DeepSpeed"))
    for log in logs:
        log.addHandler(file)
    if Ranks.from_environment().is_main:
        logger.addHandler(terminal)
    try:
        yield
    finally:
        logging.captureWarnings(capture=False)
        for log in logs:
            log.removeHandler(file)
        logger.removeHandler(terminal)
        with suppress(OSError):  # a full disk, once more
            file.close()


class Interrupts:
    """Whether this process was asked to end."""

    asked = False


@contextmanager
def termination_interrupts() -> Iterator[Interrupts]:
    """SIGTERM ends the run as Ctrl-C does: schedulers send it. What was asked is remembered.

    A rank that waits for others hears of it only when they hang up, and then as an error of the network.
    """
    interrupts = Interrupts()

    def interrupt(number: int, frame: object) -> None:
        interrupts.asked = True
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGINT] if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN else [])]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first(path: Path) -> bool:
    """Whether no other rank was here before; where the disk refuses, better said twice than never."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


class _LogFile(logging.FileHandler):
    """Says once, in one line, that it cannot be written; logging itself shows a traceback for every line."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._said:
            self._said = True
            print(f"warning: {self.baseFilename} cannot be written: {sys.exception()}", file=sys.stderr)


class _TerminalHandler(logging.Handler):
    """Writes to whatever sys.stderr is now, so that a progress bar can step aside."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)
