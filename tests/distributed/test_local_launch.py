"""`lrscale launch` of two ranks on this machine: accelerate, torchrun and the worker are the real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import ROOT, free_port

pytestmark = pytest.mark.slow

SHARDED = ["--set", "parallel.kind=zero3", "--set", "parallel.ranks_per_node=2"]
LONG = ["--set", "stages.traces.prompts=2000", "--set", "parallel.gather=per_layer"]
UNPAID = "def reward(prompts, completions, **columns):\n    return [0.0 for _ in prompts]\n"
FAILS_ON_RANK_1 = """
import os
if os.environ["RANK"] == "1":
    raise KeyError("level")
def reward(prompts, completions, **columns):
    return [1.0 for _ in prompts]
"""
DIES_ON_RANK_1 = FAILS_ON_RANK_1.replace('raise KeyError("level")', "os._exit(9)")
EXITS_ON_RANK_1 = """
import os, pathlib, threading, time
def leave():
    while not pathlib.Path("runs/run/attempts/1/rank1.log").exists():
        time.sleep(0.1)
    time.sleep(1)
    os._exit(9)
if os.environ.get("RANK") == "1":
    threading.Thread(target=leave, daemon=True).start()
"""


def environment(folder: Path) -> dict[str, str]:
    """Torchrun's and accelerate's settings of the user must not matter: some are set to something that would."""
    cache = folder / "home" / ".cache" / "huggingface" / "accelerate"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "default_config.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n")
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(cache.parent), "PET_MAX_RESTARTS": "3"}


def start(folder: Path, *options: str, path: Path = ROOT) -> subprocess.Popen[str]:
    """`path`: a folder on PYTHONPATH before the package's."""
    command = [sys.executable, "-m", "lrscale", "launch", "tiny-cpu", *SHARDED, "--name", "run", *options]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder) | {"PYTHONPATH": f"{path}:{ROOT}"},
        start_new_session=True,
        **streams,
    )


def with_reward(folder: Path, source: str) -> list[str]:
    """Options of a small run with a reward function of one's own."""
    (folder / "reward.py").write_text(source)
    options = [f"reward={{kind: function, path: {folder / 'reward.py'}}}", "parallel.gather=per_layer"]
    options += ["stages.traces.prompts=4", "stages.traces.samples_per_prompt=1"]
    return [word for option in options for word in ("--set", option)]


def codes_of(attempt: Path) -> list[int]:
    return [json.loads((attempt / f"rank{rank}-exit.json").read_text())["code"] for rank in (0, 1)]


def wait_for(path: Path, text: str, process: subprocess.Popen[str], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not (path.is_file() and text in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{text!r} never stood in {path}"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks_of(process: subprocess.Popen[str]) -> tuple[int, list[int]]:
    """Process ids of accelerate and of its ranks, in their order."""
    (agent,) = children(process.pid)
    return agent, sorted(
        pid for pid in children(agent) if b"lrscale.stages" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def wait_until_gone(pids: list[int], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while any(Path(f"/proc/{pid}/stat").exists() for pid in pids):
        assert time.monotonic() < deadline, f"left running: {pids}"
        time.sleep(0.1)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A long run on two ranks, both in the middle of sampling."""
    with start(tmp_path, *LONG) as process:
        try:
            for rank in (0, 1):
                wait_for(tmp_path / "runs" / "run" / "attempts" / "1" / f"rank{rank}.log", "traces:", process)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                time.sleep(1)
                os.killpg(process.pid, signal.SIGKILL)


def test_an_error_of_all_ranks_is_told_once_and_keeps_its_exit_code(tmp_path: Path) -> None:
    """Locks out accelerate's exit code 1 and traceback, and messages as many as there are ranks.

    Schedulers' scripts call accelerate itself: the run directory holds all that it needs, and the ranks' own codes.
    """
    with start(tmp_path, *with_reward(tmp_path, UNPAID)) as process:
        said = process.communicate(timeout=120)[1]
    run_dir = tmp_path / "runs" / "run"
    assert process.returncode == 3, said
    assert said.count("no trace earned a positive reward") == 1 and "Traceback" not in said
    assert codes_of(run_dir / "attempts" / "1") == [3, 3]
    resolved = json.loads((run_dir / "ds_config.json").read_text())
    assert (resolved["train_batch_size"], "auto" in json.dumps(resolved)) == (2, False)

    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(run_dir / "accelerate.yaml")]
    command += ["--main_process_port", str(free_port()), "-m", "lrscale.stages", "worker", str(run_dir)]
    clean = {name: value for name, value in environment(tmp_path).items() if name != "PET_MAX_RESTARTS"}
    again = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1 and again.stderr.count("no trace earned a positive reward") == 1
    assert codes_of(run_dir / "attempts" / "2") == [3, 3]


def test_one_rank_that_fails_is_heard_and_the_others_are_silent(tmp_path: Path) -> None:
    """Locks out rank 0 speaking over the rank that knows what happened, and its exit code in place of that one's."""
    with start(tmp_path, *with_reward(tmp_path, FAILS_ON_RANK_1)) as process:
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 3, said
    assert said.count("error: rank 1: ") == 1 and "KeyError: 'level'" in said, said
    assert said.count("traceback: ") == 1, said


def test_a_reward_that_dies_as_it_loads_takes_no_rank_along(tmp_path: Path) -> None:
    """It used to be the rank itself that os._exit ended."""
    with start(tmp_path, *with_reward(tmp_path, DIES_ON_RANK_1)) as process:
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 3, said
    assert "error: rank 1: reward: the worker ended with exit code 9, while it loaded the reward" in said, said


def test_a_rank_that_exits_without_a_word_is_named(tmp_path: Path) -> None:
    """Locks out a job that ends with nothing but an exit code: some library called exit."""
    (tmp_path / "sitecustomize.py").write_text(EXITS_ON_RANK_1)
    with start(tmp_path, *LONG, path=tmp_path) as process:
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 6, said
    assert said.count("error: ") == 1 and "error: rank 1 ended with exit code 9" in said, said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_ctrl_c_ends_all_ranks_quietly(
    running: subprocess.Popen[str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Locks out tracebacks of the launcher and of ranks that wait in a collective, and ranks that go on alone."""
    _, ranks = ranks_of(running)
    os.killpg(running.pid, number)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == code, said
    assert "Traceback" not in said and "error" not in said and "resume with" in said
    wait_until_gone(ranks)
    assert codes_of(tmp_path / "runs" / "run" / "attempts" / "1") == [130, 130]


def test_a_killed_rank_is_named_and_ends_the_others(running: subprocess.Popen[str]) -> None:
    """Locks out a survivor that calls a lost peer a bug of its own, or that waits for it for ever."""
    _, ranks = ranks_of(running)
    os.kill(ranks[1], signal.SIGKILL)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 6, said
    assert "error: rank 1 was killed by SIGKILL" in said and said.count("error: ") == 1, said
    wait_until_gone(ranks)


def test_ranks_do_not_outlive_their_launcher(running: subprocess.Popen[str]) -> None:
    """Locks out orphans on the GPUs after a kill -9: torchrun's ranks are in sessions of their own."""
    agent, ranks = ranks_of(running)
    os.kill(agent, signal.SIGKILL)
    assert running.wait(timeout=60) == 6
    wait_until_gone(ranks)


def test_ranks_whose_launcher_is_killed_while_they_load_are_gone(tmp_path: Path) -> None:
    """Locks out ranks that were not yet tied to their launcher when it died, and wait an hour for a rendezvous."""
    with start(tmp_path, *LONG) as process:
        deadline, ranks = time.monotonic() + 60, []
        while len(ranks) < 2 and time.monotonic() < deadline:
            agents = children(process.pid)
            ranks = ranks_of(process)[1] if agents else []
            time.sleep(0.01)
        assert len(ranks) == 2
        os.kill(agents[0], signal.SIGKILL)
        assert process.wait(timeout=60) == 6
    wait_until_gone(ranks, timeout_s=120)  # they have to be loaded first
