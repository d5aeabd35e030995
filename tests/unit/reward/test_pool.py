"""The pool against rewards that hang, die, lie, and leave things behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lrscale.records import Prompt, Score, ScoreFailed
from lrscale.reward.functions import FunctionSpec
from lrscale.reward.limits import Limits
from lrscale.reward.pool import Pool
from lrscale.reward.source import Sample
from lrscale.reward.worker import OUTPUT_MIB, WorkerSettings

linux = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
NASTY = Path(__file__).with_name("nasty.py")
OUTCOMES = {
    "hang": "timeout", "native": "timeout", "daemons-hang": "timeout", "kill-parent": "error", "close": "error",
    "raise": "error", "interrupt": "error", "exit": "error", "segfault": "error", "sys-exit": "error",
    "allocate": "error", "garbage": "error",
    "nan": "invalid", "infinity": "invalid", "none": "invalid", "text": "invalid", "few": "invalid", "many": "invalid",
    "daemons": 0.5, "twice": 0.5, "print": 0.5, "seed": 0.5, "multiprocessing": 0.5,
    "1": 1.0, "2": 2.0, "3": 3.0, "4": 4.0,
}  # fmt: skip


def sample(completion: str, **columns: Any) -> Sample:
    return Sample(Prompt(f"prompt-{completion}", "?", columns), completion, (1, 2))


@contextmanager
def pool_of(path: Path, settings: WorkerSettings | None = None, **limits: Any) -> Iterator[Pool]:
    with closing(Pool(FunctionSpec(str(path)), Limits(**{"workers": 2, **limits}), settings)) as pool:
        pool.needs()
        yield pool


def source(folder: Path, text: str) -> Path:
    path = folder / "reward.py"
    path.write_text(textwrap.dedent(text))
    return path


def results(pool: Pool, timeout_s: float = 120) -> dict[Any, Score | ScoreFailed]:
    assert pool.wait(timeout_s), "the pool hangs"
    return pool.take()


def alive(pids: set[int]) -> set[int]:
    """Those that are there and no zombies."""
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.add(pid)
    return found


def below(marker: str) -> set[int]:
    """Living processes that have the marker in their environment: it is inherited, whatever they do."""
    pids = {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}
    marked = set()
    for pid in pids - {os.getpid()}:
        try:
            environment, command = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline"))
            # multiprocessing's own resource tracker stays as long as the process that uses multiprocessing.
            if f"REWARD_TEST={marker}".encode() in environment and b"resource_tracker" not in command:
                marked.add(pid)
        except OSError:
            continue
    return alive(marked)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@linux
def test_whatever_a_reward_does_the_others_are_right_and_nothing_is_left(tmp_path: Path, monkeypatch) -> None:
    """Hangs, deaths, daemons, floods and lies in one step; each of them has cost somebody a run."""
    marker = f"{os.getpid()}-{time.time()}"
    monkeypatch.setenv("REWARD_TEST", marker)
    path = Path(shutil.copy(NASTY, tmp_path))
    settings = WorkerSettings(memory_mib=256, log=str(tmp_path / "rewards.log"))
    with pool_of(path, settings, timeout_s=20, workers=4) as pool:
        for name in OUTCOMES:
            pool.submit(name, sample(name))
        found = results(pool)
        stats = pool.take_stats()
        assert below(marker), "the control: the marker does find workers"
    got = {name: result.value if isinstance(result, Score) else result.kind for name, result in found.items()}
    assert got == OUTCOMES
    assert "MemoryError" in found["allocate"].detail and "exit code 3" in found["exit"].detail
    assert "SIGSEGV" in found["segfault"].detail and "ZeroDivisionError" in found["raise"].detail
    assert "prompt-raise" in found["raise"].detail
    assert stats.failed == {"timeout": 3, "error": 9, "invalid": 6}
    log = (tmp_path / "rewards.log").read_bytes()
    assert len(log) < (OUTPUT_MIB << 20) + 1000 and b"the rest is dropped" in log
    assert eventually(lambda: not below(marker)), "processes are left behind"


def test_what_a_reward_does_to_torch_and_to_seeds_stays_in_its_worker(tmp_path: Path) -> None:
    """A reward that seeds, for reproducibility, would otherwise make all later samples the same."""
    path = source(
        tmp_path,
        """
        import random, torch
        def reward(completions):
            random.seed(1)
            torch.manual_seed(1)
            torch.Tensor.sum = torch.nn.functional.cross_entropy = None
            return torch.rand(len(completions))
        """,
    )
    python, plain = random.getstate(), torch.get_rng_state()
    with pool_of(path, timeout_s=300, workers=1) as pool:
        pool.submit(0, sample("x"))
        assert 0.0 < results(pool)[0].value < 1.0
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), plain)
    assert callable(torch.Tensor.sum) and callable(torch.nn.functional.cross_entropy)


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_trainer_however_it_ends(tmp_path: Path, number: int) -> None:
    """kill -9 runs no clean-up of ours, and Ctrl-C must not wait for a reward that hangs."""
    path = shutil.copy(NASTY, tmp_path)
    program = tmp_path / "trainer.py"
    program.write_text(
        textwrap.dedent(f"""
        from tests.unit.reward.test_pool import pool_of, sample
        from pathlib import Path
        if __name__ == "__main__":
            with pool_of(Path({str(path)!r}), timeout_s=1000) as pool:
                for name in ("daemons-hang", "native"):
                    pool.submit(name, sample(name))
                pool.wait(1000)
        """)
    )
    marker = f"{os.getpid()}-{number}-{time.time()}"
    root = str(Path(__file__).parents[3])
    trainer = subprocess.Popen(
        [sys.executable, str(program)],
        env={**os.environ, "REWARD_TEST": marker, "PYTHONPATH": root},
        stderr=subprocess.DEVNULL,
    )
    pids = tmp_path / "nasty.pids"
    try:
        assert eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2 and len(below(marker)) >= 8)
        trainer.send_signal(number)
        trainer.wait(60)
        assert eventually(lambda: not below(marker)), "processes are left behind"
    finally:
        trainer.kill()
        trainer.wait()


def test_every_id_comes_back_exactly_once(tmp_path: Path) -> None:
    """10,000 samples, two workers, errors of all kinds and deaths on the way; each score belongs to its sample."""
    path = source(
        tmp_path,
        """
        import os, random
        def reward(completions, fate):
            if fate[0] == "die" and len(fate) == 1:
                os._exit(1)
            if "die" in fate:
                os._exit(1)
            return [{"nan": float("nan"), "bad": None}.get(f, float(c)) for c, f in zip(completions, fate)]
        """,
    )
    draw = random.Random(0)
    fates = draw.choices(["fine", "nan", "bad", "die"], [0.9, 0.06, 0.038, 0.002], k=10_000)
    with pool_of(path, batch_size=50, max_wait_s=0.0) as pool:
        found: dict[int, Score | ScoreFailed] = {}
        for index, fate in enumerate(fates):
            pool.submit(index, sample(str(index), fate=fate))
            if index % 500 == 0:
                new = pool.take()
                assert not new.keys() & found.keys()
                found |= new
        new = results(pool)
        assert not new.keys() & found.keys()
        found |= new
        assert pool.wait(0) and not pool.take()
    assert sorted(found) == list(range(10_000))
    kinds = {"nan": "invalid", "bad": "invalid", "die": "error"}
    for index, fate in enumerate(fates):
        result = found[index]
        assert result.value == index if fate == "fine" else result.kind == kinds[fate], (index, fate, result)


def test_errors_that_pass_are_tried_again_and_others_are_not(tmp_path: Path) -> None:
    """A retry of a bug costs a minute a sample; no retry of a restarting judge costs the sample."""
    path = source(
        tmp_path,
        """
        from pathlib import Path
        from lrscale.reward import PassingError
        def reward(completions):
            count = Path(__file__).with_name(completions[0])
            tries = len(count.read_text()) if count.exists() else 0
            count.write_text("x" * (tries + 1))
            if completions[0] == "bug":
                raise KeyError("bug")
            if completions[0] == "down" or tries < 2:
                raise PassingError("restarting")
            return [float(tries)]
        """,
    )
    with pool_of(path, retries=2, backoff_s=0.01) as pool:
        for name in ("restarts", "down", "bug"):
            pool.submit(name, sample(name))
        found = results(pool)
        stats = pool.take_stats()
    assert found["restarts"] == Score(2.0)
    assert (found["down"].kind, found["bug"].kind) == ("unavailable", "error")
    assert "tried 3 times" in found["down"].detail and "restarting" in found["down"].detail
    assert [(tmp_path / name).read_text() for name in ("restarts", "down", "bug")] == ["xxx", "xxx", "x"]
    assert stats.retries == 4


def test_one_that_hangs_takes_no_other_of_its_batch_along(tmp_path: Path) -> None:
    """A batch that timed out as a whole would cost fifteen good samples for one bad."""
    path = source(
        tmp_path,
        """
        import os, time
        def reward(completions):
            if "hang" in completions: time.sleep(1000)
            if "die" in completions: os._exit(1)
            return [float(len(completions)) for _ in completions]
        """,
    )
    with pool_of(path, batch_size=4, max_wait_s=30.0, timeout_s=3.0) as pool:
        for index, text in enumerate(["1", "hang", "3", "4", "5", "6", "7", "die", "9", "10", "11", "12", "13"]):
            pool.submit(index, sample(text))
        found = results(pool)
    values = [found[i].value if isinstance(found[i], Score) else found[i].kind for i in range(13)]
    assert values == [1.0, "timeout", 1.0, 1.0, 1.0, 1.0, 1.0, "error", 4.0, 4.0, 4.0, 4.0, 1.0]


def test_calls_keep_to_the_rate_and_the_concurrency_of_a_service(tmp_path: Path) -> None:
    """A judge that is asked by every worker at once answers nobody."""
    path = source(
        tmp_path,
        """
        import time
        def reward(completions):
            begin = time.monotonic(); time.sleep(0.05)
            with open(__file__ + ".log", "a") as file: print(begin, time.monotonic(), file=file)
            return [1.0] * len(completions)
        """,
    )
    with pool_of(path, workers=4, concurrency=2, rate_per_s=20.0) as pool:
        for index in range(12):
            pool.submit(index, sample(str(index)))
        assert len(results(pool)) == 12
    spans = [tuple(map(float, line.split())) for line in Path(f"{path}.log").read_text().splitlines()]
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) <= 2
    begins = sorted(begin for begin, _ in spans)
    assert begins[-1] - begins[0] > 11 / 20.0 * 0.8


def test_a_file_that_breaks_during_a_run_fails_samples_until_it_is_mended(tmp_path: Path) -> None:
    """Workers that die are replaced from a file that may have been edited meanwhile: no endless loop of starts."""
    path = source(tmp_path, "import os\ndef reward(completions): os._exit(1)\n")
    with pool_of(path, workers=1) as pool:
        path.write_text("def reward(:\n")
        for index in range(3):
            pool.submit(index, sample("x"))
        found = results(pool)
        assert all(result.kind == "error" for result in found.values())
        assert "SyntaxError" in found[2].detail
        path.write_text("def reward(completions): return [1.0]\n")
        pool.submit(3, sample("x"))
        assert results(pool) == {3: Score(1.0)}


def test_samples_arrive_as_they_were_and_odd_columns_are_refused_at_once(tmp_path: Path) -> None:
    """Half a surrogate pair, a NaN or a nested list in the data must reach the reward, or be told of."""
    path = source(
        tmp_path,
        """
        def reward(prompts, completions, completion_ids, latent_steps, odd):
            assert completions == ["\\ud800 \\n ä"] and completion_ids == [[1, 2]] and latent_steps == [3], completions
            assert odd[0]["a"] == [1, None, True] and odd[0]["b"] != odd[0]["b"]
            return [1.0]
        """,
    )
    columns = {"odd": {"a": [1, None, True], "b": float("nan")}}
    with pool_of(path, workers=1) as pool:
        pool.submit(0, Sample(Prompt("p", "?", columns), "\ud800 \n ä", (1, 2), 3))
        assert results(pool) == {0: Score(1.0)}
        with pytest.raises(ValueError, match="'p' has a column that cannot be handed to a worker"):
            pool.submit(1, Sample(Prompt("p", "?", {"when": object()}), "x", ()))
        assert pool.wait(1)


def test_a_closed_pool_says_so_instead_of_waiting_for_ever(tmp_path: Path) -> None:
    with pool_of(source(tmp_path, "def reward(completions): return [1.0]\n")) as pool:
        pool.submit(1, sample("x"))
    pool.close()
    for use in (lambda: pool.submit(2, sample("x")), lambda: pool.wait(1), pool.take):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_workers_import_no_torch(tmp_path: Path) -> None:
    """Seconds and hundreds of MiB a worker, for a function that compares two strings."""
    path = source(tmp_path, "import sys\ndef reward(completions): return ['torch' in sys.modules, ]\n")
    code = f"""
from pathlib import Path
from lrscale.reward.functions import FunctionSpec
from lrscale.reward.limits import Limits
from lrscale.reward.pool import Pool
from lrscale.reward.source import Sample
from lrscale.records import Prompt
if __name__ == "__main__":
    pool = Pool(FunctionSpec({str(path)!r}), Limits(workers=1))
    pool.submit(0, Sample(Prompt("p", "?"), "x", ()))
    assert pool.wait(60)
    print(pool.take()[0].value)
    pool.close()
"""
    program = tmp_path / "program.py"
    program.write_text(code)
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout.strip(), done.stderr) == ("0.0", "")
