"""`lrscale verify-resume`: a recipe run twice, once left alone and once killed again and again.

The second one has a random process of it killed with SIGKILL (the launcher or any rank), some of the times while a
checkpoint is being written, and is started again until it is done.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from lrscale.config.load import LoadedRecipe
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.job import job_command, job_files, require_one_node, write_job_files
from lrscale.launch.local import exit_code
from lrscale.launch.rundir import create_run, require_free

LEFT_ALONE, KILLED = "left-alone", "killed"
_POLL_S = 0.005
_MOST_DELAY_S = 0.5
_INSIDE_CHECKPOINT = 4
"""Every so manyeth kill waits for a checkpoint that is half written."""
_LOCK_S = 60.0


@dataclass(frozen=True, slots=True)
class Verification:
    """The two runs, side by side."""

    left_alone: Path
    killed: Path
    kills: int
    """Processes killed, each in a start of its own."""
    inside_checkpoint: int
    """Kills while a checkpoint was half written."""


def verify_resume(
    loaded: LoadedRecipe, folder: Path, *, kills: int, seed: int, say: Callable[[str], None]
) -> Verification:
    """Run the recipe twice in `folder`, and kill the second run at `kills` random moments.

    Raises:
        RecipeError: it asks for several nodes.
        LaunchError: a run that nobody killed failed; its own words are in FOLDER/NAME.log.
    """
    require_one_node(loaded)
    say(f"running {loaded.recipe.name} undisturbed (log: {folder / LEFT_ALONE}.log)")
    calm = _Run(loaded, folder, LEFT_ALONE)
    started = time.monotonic()
    calm.finish()
    lines = calm.lines()
    say(f"done in {time.monotonic() - started:.0f} s, {lines} lines of metrics; now with {kills} kills")
    dice = random.Random(seed)
    moments = sorted(dice.uniform(0, lines) for _ in range(kills))
    run = _Run(loaded, folder, KILLED)
    done, inside = 0, 0
    for number, moment in enumerate(moments, start=1):
        want_checkpoint = number % _INSIDE_CHECKPOINT == 0
        killed, half_written = run.start_and_kill(moment, dice, want_checkpoint=want_checkpoint)
        if killed is None:
            break  # the last moments can come after the end
        done, inside = done + 1, inside + half_written
        say(
            f"  kill {number} of {kills}: {killed}, {run.lines()} lines of metrics" + half_written * ", in a checkpoint"
        )
    run.finish()
    if not done:
        raise LaunchError(
            f"{run.path.name} was over before it could be killed, so nothing is proven",
            code=ExitCode.RUN_FAILED,
            help="give it more steps, e.g. --set stages.rl.steps=20",
        )
    return Verification(calm.path, run.path, done, inside)


@contextmanager
def folder_for(keep: Path | None) -> Iterator[Path]:
    """Where both runs go: `keep`, or a temporary folder that is removed when the block ends well.

    Raises:
        LaunchError: `keep` already holds such runs.
    """
    if keep is not None:
        if any((keep / name).exists() for name in (LEFT_ALONE, KILLED)):
            raise LaunchError(
                f"{keep} already holds runs of a verification", code=ExitCode.USAGE, help="name another folder"
            )
        yield keep
        return
    folder = Path(tempfile.mkdtemp(prefix="lrscale-verify-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def different(runs: Verification, difference: str) -> LaunchError:
    """The refusal that names where the two runs part."""
    return LaunchError(
        f"the killed run is not the one left alone: {difference}",
        code=ExitCode.RUN_FAILED,
        place=f"{runs.left_alone}\n{runs.killed}",
        help="does a reward or a task of yours depend on time, on a counter, or on unseeded random numbers?",
    )


class _Run:
    """One of the two runs: started as `lrscale launch` starts it, as often as it takes."""

    def __init__(self, loaded: LoadedRecipe, folder: Path, name: str) -> None:
        recipe = loaded.recipe.model_copy(update={"name": name})
        self.path = create_run(recipe, folder, ["verify-resume"]).path
        self._log = folder / f"{name}.log"
        self._loaded = loaded
        write_job_files(self.path, job_files(loaded))

    def lines(self) -> int:
        path = self.path / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def finish(self) -> None:
        """To the end. Raises LaunchError where it fails."""
        if (self.path / "done.json").is_file():
            return
        with self._started() as process:
            code = exit_code(process.wait())
        if code:
            raise LaunchError(
                f"the run {self.path.name} failed by itself (exit code {code})",
                code=ExitCode.RUN_FAILED,
                place=f"{self._log}\n{self.path / 'attempts' / 'latest'}",
                help="mend what its log says; a run that fails cannot be compared",
            )

    def start_and_kill(self, moment: float, dice: random.Random, *, want_checkpoint: bool) -> tuple[str | None, bool]:
        """Start, and kill one process after `moment` lines of metrics; which one, and whether a checkpoint was open.

        None where the run came to its end first.
        """
        ranks = self._loaded.recipe.world_size
        delay_s = 0.0 if want_checkpoint else dice.uniform(0, _MOST_DELAY_S)
        with self._started() as process:
            while process.poll() is None:
                ready = self._half_written() if want_checkpoint else self.lines() >= moment
                if ready and len(_family(process.pid)) >= (ranks + 1 if ranks > 1 else 1):
                    time.sleep(delay_s)
                    break
                time.sleep(_POLL_S)
            family = _family(process.pid)
            half_written = self._half_written()
            if process.poll() is not None or not family:
                return None, False
            victim = dice.choice(family)
            try:
                victim.kill()
            except psutil.NoSuchProcess:  # it was quicker
                return None, False
            process.wait()
        return f"killed {'the launcher' if ranks > 1 and victim == family[0] else 'a rank'}", half_written

    def _half_written(self) -> bool:
        return any(self.path.glob("checkpoints/*/.tmp-step-*"))

    @contextmanager
    def _started(self) -> Iterator[subprocess.Popen[bytes]]:
        """The job as a process group of its own; none of it is left at the end of the block."""
        _wait_until_free(self.path)
        module, arguments = job_command(self._loaded.recipe, self.path)
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
            )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _family(pid: int) -> list[psutil.Process]:
    """A process and the ranks under it (helpers of theirs left out), the process first."""
    try:
        first = psutil.Process(pid)
        below = [child for child in first.children(recursive=True) if "lrscale.stages" in child.cmdline()]
    except psutil.Error:
        return []
    return [first, *below]


def _wait_until_free(path: Path) -> None:
    """Ranks whose launcher was killed die within moments; the main one holds the run until then."""
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            return require_free(path)
        except LaunchError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)
