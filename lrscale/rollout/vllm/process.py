"""The processes of engines: started, found, and ended. The one file of the runtime that starts programs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lrscale.rollout.vllm.settings import EngineSettings

_GRACE_S = 15.0
"""For an engine to end when asked, its keeper's own grace included."""
_TRAINERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which torch would take an engine for a rank of the trainer."""
_LAST_WORDS = 15


class ServerProcess:
    """A module of this package that keeps itself (lrscale.keeper) and holds a server; its output goes to a log."""

    def __init__(self, name: str, log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def run(self, module: str, *arguments: str) -> None:
        """Returns at once."""
        variables = [f"{name}={value}" for name, value in self._environment.items()]
        # env: what the trainer's launcher said of ranks is not for vLLM, and only one file reads the environment here.
        command = ["env", *(part for name in _TRAINERS for part in ("-u", name)), *variables]
        command += [sys.executable, "-m", module, *arguments]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, None where it still runs."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Ask it to end, and kill it and all that it started if it does not."""
        if self._process is None:
            return
        if self.alive:
            self._process.terminate()
            self.wait(_GRACE_S)
        self.kill()

    def kill(self) -> None:
        """Its keeper kills everything below it and cleans up; returns when it has."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.write(b"x")  # a pipe that merely breaks says that this process is dead
                self._process.stdin.close()
        if self.wait(_GRACE_S) is None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def last_words(self) -> str:
        """The end of its log, for people."""
        return "\n".join(f"    {line}" for line in self._lines()[-_LAST_WORDS:])

    def doing(self) -> str:
        """What its log says last, in short."""
        return next((line.strip()[-100:] for line in reversed(self._lines()) if line.strip()), "starting")

    def _lines(self) -> list[str]:
        try:
            return self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []


class EngineProcess(ServerProcess):
    """One rollout engine that this process owns. Its log, settings and address lie in a folder of the run."""

    def __init__(self, name: str, settings: EngineSettings, folder: Path, environment: Mapping[str, str]) -> None:
        super().__init__(name, folder / f"{name}.log", environment)
        self._folder = folder
        self._settings = replace(settings, address_file=str(folder / f"{name}.address.json"))

    @property
    def url(self) -> str | None:
        """Where it listens; None while it does not."""
        return read_address(Path(self._settings.address_file))

    def start(self) -> None:
        """Returns at once; the model takes its time to load."""
        self._folder.mkdir(parents=True, exist_ok=True)
        Path(self._settings.address_file).unlink(missing_ok=True)
        self.run("lrscale.rollout.vllm.server", str(self._settings.write(self._folder / f"{self.name}.json")))


def read_address(path: Path) -> str | None:
    """The URL in an address file; None where there is none (yet)."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["url"])
    except (OSError, ValueError, KeyError):
        return None
