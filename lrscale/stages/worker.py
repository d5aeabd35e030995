"""The job: runs the stages of a run directory and resumes them exactly.

    python -m lrscale.stages.worker RUN_DIR [--attempt N]

The run directory is all that it is given; where the recipe asks for several ranks, each of them is started so
(`lrscale launch` and `accelerate launch` do it). Exit codes: 0 done, 2 usage, 3 the recipe asks for something
that does not work, 6 the run failed, 7 no such run, 75 another worker is at it, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from lrscale.config.errors import RecipeError
from lrscale.config.load import read_recipe
from lrscale.config.recipe import Recipe
from lrscale.parallel.checkpoint import CheckpointError
from lrscale.parallel.ds_config import settled
from lrscale.parallel.engine import NonFiniteError
from lrscale.parallel.lockstep import Lockstep, PeerError
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.start import start_process_group, stop_process_group
from lrscale.report.metrics import MetricsDamaged
from lrscale.report.table import print_summary
from lrscale.reward.budget import RewardBudgetError
from lrscale.rollout.vllm.client import EngineError
from lrscale.rollout.weights import PublicationError
from lrscale.stages.attempts import LockedError, Voice, locked, logged_to, new_attempt, termination_interrupts
from lrscale.stages.drain import NEVER, Drain, Drained
from lrscale.stages.parts import build_parts, read_ds_config
from lrscale.stages.pipeline import run_stages
from lrscale.stages.rollout_io import StateDamagedError, write_json
from lrscale.stages.run_log import logger
from lrscale.stages.sampling import NonFiniteSampleError

BAD_RECIPE, FAILED, NOT_FOUND, TRY_LATER, INTERRUPTED = 3, 6, 7, 75, 130

_DAMAGED = (StateDamagedError, MetricsDamaged)
_OF_ENGINES = (EngineError, PublicationError)
_KNOWN = (CheckpointError, NonFiniteError, NonFiniteSampleError, RewardBudgetError, OSError, *_DAMAGED, *_OF_ENGINES)
"""Failures whose message says what happened and what to do."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
"""What gloo says when another rank has ended."""
_LINGER_S = 20.0
"""A rank that fails because of another one lets that one be the first to end: its exit code and words count."""


def main(arguments: list[str] | None = None) -> int:
    """Run or resume; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lrscale.stages.worker", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run_dir", type=Path, help="a run directory with recipe.json")
    parser.add_argument("--attempt", type=int, help="attempts/N as the batch script made it; default: a new one")
    given = parser.parse_args(arguments)
    run_dir: Path = given.run_dir
    voice = Voice(Ranks())
    try:
        voice = Voice(Ranks.from_environment())
        if not (run_dir / "recipe.json").is_file():
            voice.say(f"error: {run_dir} is no run directory: it has no recipe.json (lrscale launch makes one)")
            return NOT_FOUND
        recipe = read_recipe(run_dir / "recipe.json")
        ranks = start_process_group(recipe)
    except RecipeError as error:
        voice.say(str(error))
        return BAD_RECIPE
    except ValueError as error:
        voice.say(f"error: {error}")
        return BAD_RECIPE
    except RuntimeError as error:  # torch's, of every kind of network trouble
        voice.say(f"error: the ranks did not meet: {error}\n  can every node reach {Ranks.from_environment().host}?")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    lockstep = Lockstep(ranks, timeout=timedelta(seconds=recipe.parallel.collective_timeout_s))
    code = _guarded_attempt(run_dir, recipe, lockstep, voice, number=given.attempt)
    if ranks.world_size > 1 and code:
        # Without goodbye: to leave the process group can wait for ever for ranks that are stuck.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    stop_process_group()
    return code


def _guarded_attempt(run_dir: Path, recipe: Recipe, lockstep: Lockstep, voice: Voice, *, number: int | None) -> int:
    try:
        with held_by_main(run_dir / "lock", lockstep):
            return attempt(run_dir, recipe, lockstep, voice, number=number)
    except PeerError:  # the main rank could not begin, and has said why
        return linger(FAILED)
    except LockedError as error:
        voice.say(f"error: {error}")
        return TRY_LATER
    except OSError as error:
        voice.say(f"error: {run_dir} cannot be written: {error}\n  {_room_advice(error, run_dir)}")
        return FAILED
    except KeyboardInterrupt:
        voice.say("stopped; launched again, the run goes on from its last checkpoint")
        return INTERRUPTED


@contextmanager
def held_by_main(path: Path, lockstep: Lockstep) -> Iterator[None]:
    """The main rank holds the run directory for all; LockedError there, PeerError on the others, if it cannot."""
    with ExitStack() as stack:
        lockstep.on_main(lambda: stack.enter_context(locked(path)))
        yield


def attempt(run_dir: Path, recipe: Recipe, lockstep: Lockstep, voice: Voice, *, number: int | None = None) -> int:
    """One start of the job, under the lock: logged to attempts/N, its end in attempts/N/exit.json.

    `number` is that of a folder which is there already: a batch script's.
    """
    ranks = lockstep.ranks
    if lockstep.on_main((run_dir / "done.json").is_file):
        voice.say(f"{run_dir} is finished; nothing to do")
        if ranks.is_main:
            conclude(run_dir, recipe, rewrite=False)
        return 0
    folder = Path(lockstep.on_main(lambda: str(attempt_folder(run_dir, number))))
    log = folder / f"rank{ranks.rank}.log"
    with logged_to(log), voice.hushed(log):
        started = time.time()

        def end(code: int, reason: str) -> None:
            ending = {"code": code, "reason": reason, "started": started, "ended": time.time()}
            names = ["exit.json"] if ranks.is_main else []
            names += [f"rank{ranks.rank}-exit.json"] if ranks.world_size > 1 else []
            for name in names:
                try:
                    write_json(folder / name, ending)
                except OSError as error:  # the run's own ending counts
                    voice.say(f"warning: {folder / name} cannot be written: {error}")

        def stalled(message: str) -> None:
            voice.fail(f"error: {message}", folder)
            end(FAILED, message)

        lockstep.watch(limit_s=recipe.parallel.stall_limit_s, on_stall=stalled)
        code, reason = guarded_run(run_dir, recipe, lockstep, voice, folder)
        end(code, reason)
    return code


def attempt_folder(run_dir: Path, number: int | None) -> Path:
    """The folder that a batch script has made, or a new one."""
    attempts = run_dir / "attempts"
    return new_attempt(attempts) if number is None else attempts / str(number)


def guarded_run(run_dir: Path, recipe: Recipe, lockstep: Lockstep, voice: Voice, folder: Path) -> tuple[int, str]:
    """Run to the end or to an error that people can read; the traceback goes to the attempt's log."""
    with termination_interrupts() as interrupts:
        try:
            run(run_dir, recipe, lockstep, Drain(folder, lockstep))
            return 0, "done"
        except Drained as drained:
            voice.say(f"{drained}; launched again, the run goes on from there")
            return INTERRUPTED, str(drained)
        except KeyboardInterrupt:
            logger.info("interrupted")
            if lockstep.alone:  # with several ranks it may be another one's failure that ends this one
                voice.say("stopped; launched again, the run goes on from its last checkpoint")
            return INTERRUPTED, "interrupted"
        except Exception as error:  # noqa: BLE001 - sorted by what people can do about it
            if not lockstep.alone:
                logger.info(traceback.format_exc())
                if interrupts.asked:
                    return INTERRUPTED, f"interrupted ({type(error).__name__}: {error})"
                if _of_a_peer(error) and linger(FAILED) == INTERRUPTED:
                    return INTERRUPTED, f"ended because of another rank ({error})"
            return explained(error, voice, folder)


def linger(code: int) -> int:
    """Wait to be ended by the launcher, which does so once it has seen the rank that failed; INTERRUPTED if it does."""
    try:
        with termination_interrupts():
            time.sleep(_LINGER_S)
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _of_a_peer(error: Exception) -> bool:
    """Whether an error is only the echo of another rank's end."""
    network = isinstance(error, distributed.DistError) or any(words in str(error) for words in _LOST)
    return isinstance(error, PeerError) or (network and not isinstance(error, OSError))


def explained(error: Exception, voice: Voice, folder: Path) -> tuple[int, str]:
    """Tell what ended the run and what to do; the exit code and the reason for the record."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, _KNOWN):  # before ValueError: damaged metrics are one, and no fault of the recipe
        return _failed(error, voice, folder, FAILED), reason
    if isinstance(error, ValueError):
        return _failed(error, voice, folder, BAD_RECIPE), reason
    if isinstance(error, torch.OutOfMemoryError):
        return _out_of_memory(error, voice, folder), reason
    if _of_a_peer(error):
        voice.fail(f"error: the other ranks are out of reach: {error}\n  their own words: {folder}", folder)
        return FAILED, reason
    logger.error(traceback.format_exc())
    voice.fail(
        f"error: {type(error).__name__}: {error}\n  a bug in lrscale or in a library under it; the traceback is in "
        f"{folder}. Launched again, the run goes on from its last checkpoint",
        folder,
    )
    return FAILED, reason


def run(run_dir: Path, recipe: Recipe, lockstep: Lockstep, drain: Drain = NEVER) -> None:
    """Build the parts, run the stages, report.

    Raises:
        Drained: it was asked to end, has saved all, and the mark for whoever asked stands.
    """
    lockstep.on_main(lambda: _settle_ds_config(run_dir, recipe))
    parts = replace(build_parts(recipe, run_dir, lockstep), drain=drain)
    try:
        run_stages(parts)
    except Drained as drained:
        drain.mark(drained)
        raise
    finally:
        parts.rollouts.close()
        parts.sampler.scorer.close()
        parts.log.close()
    lockstep.barrier()
    if lockstep.ranks.is_main:
        write_json(run_dir / "done.json", {"arms": list(recipe.stages.rl.arms), "finished": time.time()})
        conclude(run_dir, recipe, rewrite=True)


def _settle_ds_config(run_dir: Path, recipe: Recipe) -> None:
    """In the file itself, which then says what the run ran with."""
    config = read_ds_config(run_dir)
    if recipe.parallel.kind == "zero3" and config is not None:
        complete = settled(config, recipe.model)
        if complete is not config:
            write_json(run_dir / "ds_config.json", complete)


def conclude(run_dir: Path, recipe: Recipe, *, rewrite: bool) -> None:
    """The report, and the closing table. A report written during the run is out of date: `rewrite`."""
    page = run_dir / "report.html"
    if recipe.report.html and (rewrite or not page.is_file()):
        from lrscale.report.page import write_report  # charts take a second to import

        write_report([run_dir], page)
    print_summary([run_dir])


def _failed(error: Exception, voice: Voice, folder: Path, code: int) -> int:
    logger.info(traceback.format_exc())
    message = str(error).removeprefix("error: ")  # a RecipeError says so itself
    voice.fail(f"error: {message}\n  traceback: {folder}; {_advice(error, folder)}", folder)
    return code


def _advice(error: Exception, folder: Path) -> str:
    """What a new launch does about it: resuming is exact, so what the recipe or the data caused comes again."""
    if isinstance(error, _DAMAGED):
        return "once the file is restored, launch again; or start a new run under another name"
    if isinstance(error, OSError):
        return _room_advice(error, folder)
    if isinstance(error, CheckpointError | EngineError | PublicationError):
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


def _out_of_memory(error: torch.OutOfMemoryError, voice: Voice, folder: Path) -> int:
    logger.info(traceback.format_exc())
    voice.fail(
        f"error: out of GPU memory: {str(error).split('. ', maxsplit=1)[0]}\n  lower rollout.batch_rows (if it happened "
        "while sampling) or optimisation.micro_batch_tokens (while training), or set model.gradient_checkpointing: "
        f"true, in a new run under another name; traceback: {folder}",
        folder,
    )
    return FAILED


if __name__ == "__main__":
    warnings.filterwarnings("default", category=UserWarning)
    sys.exit(main())
