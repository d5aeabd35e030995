"""The job: runs the stages of a run directory and resumes them exactly.

    python -m lrscale.stages.worker RUN_DIR

The run directory is all that it is given. Exit codes: 0 done, 2 usage, 3 the recipe asks for something
that does not work, 6 the run failed, 7 no such run, 75 another worker is at it, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lrscale.config.errors import RecipeError
from lrscale.config.load import read_recipe
from lrscale.config.recipe import Recipe
from lrscale.parallel.checkpoint import CheckpointError, DamagedCheckpointWarning
from lrscale.parallel.engine import NonFiniteError
from lrscale.parallel.lockstep import Lockstep
from lrscale.parallel.ranks import Ranks
from lrscale.report.metrics import MetricsDamaged
from lrscale.report.table import print_summary
from lrscale.reward.scorer import RewardBudgetError
from lrscale.stages.parts import build_parts
from lrscale.stages.pipeline import run_stages
from lrscale.stages.rollout_io import StateDamagedError, write_json
from lrscale.stages.run_log import logger
from lrscale.stages.sampling import NonFiniteSampleError

BAD_RECIPE, FAILED, NOT_FOUND, TRY_LATER, INTERRUPTED = 3, 6, 7, 75, 130

_DAMAGED = (StateDamagedError, MetricsDamaged)
_KNOWN = (CheckpointError, NonFiniteError, NonFiniteSampleError, RewardBudgetError, OSError, *_DAMAGED)
"""Failures whose message says what happened and what to do."""


class LockedError(RuntimeError):
    """Another worker holds the run directory."""


def main(arguments: list[str] | None = None) -> int:
    """Run or resume; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lrscale.stages.worker", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run_dir", type=Path, help="a run directory with recipe.json")
    run_dir: Path = parser.parse_args(arguments).run_dir
    if not (run_dir / "recipe.json").is_file():
        _tell(f"error: {run_dir} is no run directory: it has no recipe.json (lrscale launch makes one)")
        return NOT_FOUND
    try:
        with locked(run_dir / "lock"):
            return attempt(run_dir)
    except LockedError as error:
        _tell(f"error: {error}")
        return TRY_LATER
    except RecipeError as error:
        _tell(str(error))
        return BAD_RECIPE
    except OSError as error:
        _tell(f"error: {run_dir} cannot be written: {error}\n  {_room_advice(error, run_dir)}")
        return FAILED
    except KeyboardInterrupt:
        _tell("stopped; launched again, the run goes on from its last checkpoint")
        return INTERRUPTED


def attempt(run_dir: Path) -> int:
    """One start of the job, under the lock: logged to attempts/N, its end in attempts/N/exit.json."""
    if (run_dir / "done.json").is_file():
        _tell(f"{run_dir} is finished; nothing to do")
        conclude(run_dir, read_recipe(run_dir / "recipe.json"), rewrite=False)
        return 0
    folder = new_attempt(run_dir / "attempts")
    with logged_to(folder / f"rank{Ranks.from_environment().rank}.log"):
        started = time.time()
        code, reason = guarded_run(run_dir, folder)
        ending = {"code": code, "reason": reason, "started": started, "ended": time.time()}
        try:
            write_json(folder / "exit.json", ending)
        except OSError as error:  # the run's own ending counts
            _tell(f"warning: {folder / 'exit.json'} cannot be written: {error}")
    return code


def guarded_run(run_dir: Path, folder: Path) -> tuple[int, str]:
    """Run to the end or to an error that people can read; the traceback goes to the attempt's log."""
    try:
        with termination_interrupts():
            run(run_dir)
        return 0, "done"
    except KeyboardInterrupt:
        logger.info("interrupted")
        _tell("stopped; launched again, the run goes on from its last checkpoint")
        return INTERRUPTED, "interrupted"
    except _KNOWN as error:  # before ValueError: damaged metrics are one, and no fault of the recipe
        return _failed(error, folder, FAILED)
    except ValueError as error:
        return _failed(error, folder, BAD_RECIPE)
    except torch.OutOfMemoryError as error:
        return _out_of_memory(error, folder)
    except Exception as error:  # noqa: BLE001 - the last handler: whatever it is, the log gets all of it
        logger.error(traceback.format_exc())
        _tell(
            f"error: {type(error).__name__}: {error}\n  a bug in lrscale or in a library under it; the traceback is in "
            f"{folder}. Launched again, the run goes on from its last checkpoint"
        )
        return FAILED, f"{type(error).__name__}: {error}"


def run(run_dir: Path) -> None:
    """Build the parts, run the stages, report."""
    recipe = read_recipe(run_dir / "recipe.json")
    parts = build_parts(recipe, run_dir, Lockstep(Ranks.from_environment()))
    try:
        run_stages(parts)
    finally:
        parts.log.close()
    write_json(run_dir / "done.json", {"arms": list(recipe.stages.rl.arms), "finished": time.time()})
    conclude(run_dir, recipe, rewrite=True)


def conclude(run_dir: Path, recipe: Recipe, *, rewrite: bool) -> None:
    """The report, and the closing table. A report written during the run is out of date: `rewrite`."""
    page = run_dir / "report.html"
    if recipe.report.html and (rewrite or not page.is_file()):
        from lrscale.report.page import write_report  # charts take a second to import

        write_report([run_dir], page)
    print_summary([run_dir])


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
            raise LockedError(
                f"{path.parent} is being run by another worker ({file.read().decode(errors='replace').strip()}); wait for it, or stop it and "
                "launch again"
            ) from None
        with suppress(OSError):  # a full disk: the lock holds all the same, only who has it is not said
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
        with suppress(OSError):
            file.truncate(0)


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
    for log in (logger, captured):
        log.addHandler(file)
    logger.addHandler(terminal)
    try:
        yield
    finally:
        logging.captureWarnings(capture=False)
        for log in (logger, captured):
            log.removeHandler(file)
        logger.removeHandler(terminal)
        with suppress(OSError):  # a full disk, once more
            file.close()


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: schedulers send it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _LogFile(logging.FileHandler):
    """Says once, in one line, that it cannot be written; logging itself shows a traceback for every line."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._said:
            self._said = True
            _tell(f"warning: {self.baseFilename} cannot be written: {sys.exception()}")


class _TerminalHandler(logging.Handler):
    """Writes to whatever sys.stderr is now, so that a progress bar can step aside."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _failed(error: Exception, folder: Path, code: int) -> tuple[int, str]:
    logger.info(traceback.format_exc())
    message = str(error).removeprefix("error: ")  # a RecipeError says so itself
    _tell(f"error: {message}\n  traceback: {folder}; {_advice(error, folder)}")
    return code, f"{type(error).__name__}: {error}"


def _advice(error: Exception, folder: Path) -> str:
    """What a new launch does about it: resuming is exact, so what the recipe or the data caused comes again."""
    if isinstance(error, _DAMAGED):
        return "once the file is restored, launch again; or start a new run under another name"
    if isinstance(error, OSError):
        return _room_advice(error, folder)
    if isinstance(error, CheckpointError):
        return "launched again, the run goes on from its last checkpoint"
    return (
        "launched again as it is, the run meets the same error: mend what is named (a file may be mended in place "
        "and the same command resumes; a changed recipe needs another name once the run has made something)"
    )


def _room_advice(error: OSError, folder: Path) -> str:
    """What to do about a disk that refuses."""
    resumes = "launched again, the run goes on from its last checkpoint"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return resumes
    free = shutil.disk_usage(folder).free / 2**20
    return f"needed is room for logs, metrics and checkpoints, free {free:.1f} MiB: make room (or raise the quota); {resumes}"


def _out_of_memory(error: torch.OutOfMemoryError, folder: Path) -> tuple[int, str]:
    logger.info(traceback.format_exc())
    _tell(
        f"error: out of GPU memory: {str(error).split('. ', maxsplit=1)[0]}\n  lower rollout.batch_rows (if it happened "
        "while sampling) or optimisation.micro_batch_tokens (while training), or set model.gradient_checkpointing: "
        f"true, in a new run under another name; traceback: {folder}"
    )
    return FAILED, f"{type(error).__name__}: {error}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    warnings.filterwarnings("default", category=UserWarning)
    sys.exit(main())
