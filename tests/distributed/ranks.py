"""Starts a program of tests/distributed/programs on several gloo processes.

The ranks are forked from a server that has imported torch, DeepSpeed and the package once: importing takes a rank longer
than most programs run. test_local_launch.py and others start jobs as users do.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any

from torch.distributed import TCPStore

from lrscale.launch.job import free_port

__all__ = ["ROOT", "Outcome", "Program", "free_port", "launch", "started"]

PROGRAMS = Path(__file__).parent / "programs"
ROOT = PROGRAMS.parent.parent.parent

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["tests.distributed.programs.preloaded"])


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    code: int | None
    """That of the first rank that failed; None where it ran past its time and was killed."""
    results: list[dict[str, Any]]
    """What the ranks reported, in the order of ranks."""
    stderr: str

    def by_rank(self) -> list[dict[str, Any]]:
        return sorted(self.results, key=lambda result: result["rank"])


class Program:
    """A program that runs on so many ranks; each prints one line of JSON that starts with {"rank"."""

    def __init__(
        self, folder: Path, program: str, *arguments: str, ranks: int = 2, ranks_a_node: int | None = None
    ) -> None:
        here = ranks_a_node or ranks
        self._folder = folder
        # As torchrun does it: the launcher's store outlives every rank.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._ranks = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % here), "WORLD_SIZE": str(ranks)}
            own |= {"LOCAL_WORLD_SIZE": str(here)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
            own |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            self._ranks.append(_FORKED.Process(target=_run, args=(program, arguments, own, str(folder))))
        for process in self._ranks:
            process.start()

    def outcome(self, timeout_s: float) -> Outcome:
        """Waits for all ranks; once one has failed, or time is up, none of the others is left."""
        deadline, waited_for, code = monotonic() + timeout_s, list(self._ranks), 0
        while waited_for and code == 0:
            if not wait([process.sentinel for process in waited_for], deadline - monotonic()):
                return self._outcome(None)
            for process in [process for process in waited_for if not process.is_alive()]:
                waited_for.remove(process)
                code = code or process.exitcode or 0
        return self._outcome(code)

    def _outcome(self, code: int | None) -> Outcome:
        self.end()
        lines = "".join(path.read_text() for path in sorted(self._folder.glob("stdout-*"))).splitlines()
        stderr = "".join(path.read_text() for path in sorted(self._folder.glob("stderr-*")))
        return Outcome(code, [json.loads(line) for line in lines if line.startswith('{"rank"')], stderr)

    def end(self) -> None:
        """No rank is left."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()


def _run(program: str, arguments: Sequence[str], environment: dict[str, str], folder: str) -> None:
    """One rank: the program, as `python -m` would run it with these variables."""
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{folder}/{name}-{environment['RANK']}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.argv = [program, *arguments]
    importlib.import_module(f"tests.distributed.programs.{program}").main()


@contextmanager
def started(program: str, *arguments: str, ranks: int = 2, ranks_a_node: int | None = None) -> Iterator[Program]:
    """The program while it runs, for tests that have several to wait for; none is left at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        running = Program(Path(folder), program, *arguments, ranks=ranks, ranks_a_node=ranks_a_node)
        try:
            yield running
        finally:
            running.end()


def launch(
    program: str, *arguments: str, ranks: int = 2, ranks_a_node: int | None = None, timeout_s: float = 300
) -> Outcome:
    """The program from its start to its end."""
    with started(program, *arguments, ranks=ranks, ranks_a_node=ranks_a_node) as running:
        return running.outcome(timeout_s)
