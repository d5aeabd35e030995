"""Checkpoints under real trouble: full disks, size limits, kill -9, flipped bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lrscale.parallel.checkpoint import CheckpointError, CheckpointStore
from tests.unit.parallel.stand_in import same, small_engine, update, weights

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "latest")


def child(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_round_trip_and_pruning(tmp_path):
    """Locks out "newest" by name (step-9 after step-10) or by clock, and a prune of the wrong end."""
    store, engine = CheckpointStore(tmp_path / "c", keep_last=2), small_engine()
    assert store.latest() is None
    for step in (8, 9, 10):
        update(engine, "base", step)
        path = store.save(f"step-{step}", engine, {"step": step, "share": 0.1, "none": None})
        assert path == tmp_path / "c" / f"step-{step}"
    assert names(tmp_path / "c") == ["step-10", "step-9"]
    os.utime(tmp_path / "c/step-9")
    update(engine, "base", 11)
    fresh = small_engine()
    newest = CheckpointStore(tmp_path / "c").latest()
    assert newest.name == "step-10"
    assert store.load(newest, fresh) == {"step": 10, "share": 0.1, "none": None}
    update(fresh, "base", 11)
    assert same(weights(fresh), weights(engine))


@pytest.mark.parametrize("damaged", ["rank-00000.safetensors", "state.json", "rank-00000.json"])
def test_damaged_checkpoint_is_named_and_skipped(tmp_path, damaged):
    """Locks out a resume from flipped bits, and one that dies instead of taking the former checkpoint."""
    store, engine = CheckpointStore(tmp_path), small_engine()
    update(engine, "base", 0)
    store.save("a", engine, {})
    store.save("b", engine, {"step": 1})
    path = tmp_path / "b" / damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    expected = json.loads((tmp_path / "b/manifest.json").read_text())["files"][damaged]["sha256"]
    with pytest.warns(UserWarning, match=rf"{damaged} has sha256 \w+, written was {expected}"):
        assert store.latest().name == "a"


@pytest.mark.filterwarnings("ignore:checkpoint")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "sequence": 2}', '{"format": 9, "sequence": 2}'])
def test_unreadable_manifest_is_skipped(tmp_path, text):
    """Locks out a crash of the resume by a manifest that is cut off or strange."""
    store, engine = CheckpointStore(tmp_path), small_engine()
    store.save("a", engine, {})
    store.save("b", engine, {})
    (tmp_path / "b/manifest.json").write_text(text)
    with pytest.warns(UserWarning, match=r"b is damaged.*manifest\.json"):
        assert store.latest().name == "a"
    store.save("c", engine, {})  # and saving goes on
    (tmp_path / "c/rank-00000.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"rank-00000.safetensors is missing"):
        assert store.latest().name == "a"


def test_same_name_is_replaced(tmp_path):
    """Locks out a resumed run that fails at the checkpoint it had already written."""
    store, engine = CheckpointStore(tmp_path, keep_last=1), small_engine()
    store.save("a", engine, {"try": 1})
    store.save("a", engine, {"try": 2})
    assert names(tmp_path) == ["a"]
    assert store.load(store.latest(), engine) == {"try": 2}


def test_replacement_cut_off_between_its_renames(tmp_path):
    """Locks out the loss of the only checkpoint when a process dies in mid-replacement."""
    store, engine = CheckpointStore(tmp_path, keep_last=1), small_engine()
    store.save("a", engine, {"try": 1})
    (tmp_path / "a").rename(tmp_path / ".old-a")
    assert store.load(store.latest(), engine) == {"try": 1}
    shutil.copytree(tmp_path / "a", tmp_path / ".old-a")
    store.save("b", engine, {})
    assert names(tmp_path) == ["b"]


def test_interrupt_in_mid_save(tmp_path, monkeypatch):
    """Locks out a half-written folder after Ctrl-C."""
    store, engine = CheckpointStore(tmp_path), small_engine()
    store.save("a", engine, {})
    save = type(engine).save

    def interrupted(self, folder):
        save(self, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(engine), "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save("b", engine, {})
    assert names(tmp_path) == ["a"]


def test_bad_names_and_states_are_refused(tmp_path):
    store, engine = CheckpointStore(tmp_path), small_engine()
    for name in ("", "../x", "a/b", ".tmp-a", "a\n"):
        with pytest.raises(ValueError, match="checkpoint name"):
            store.save(name, engine, {})
    with pytest.raises(ValueError, match="JSON"):
        store.save("a", engine, {"loss": float("nan")})
    with pytest.raises(ValueError, match="keep_last"):
        CheckpointStore(tmp_path, keep_last=0)
    assert names(tmp_path) == []


def test_unwritable_folder(tmp_path):
    """Locks out a traceback of the standard library where the folder's path is taken by a file."""
    (tmp_path / "c").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        CheckpointStore(tmp_path / "c").save("a", small_engine(), {})


def test_full_disk(tmp_path):
    """A real full disk: the error says what is needed and free, nothing half-written stays, the former one loads."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        engine = small_engine(width=300)  # 1.1 MB of weights: one checkpoint fits in 2 MiB, two do not
        store = CheckpointStore(disk / "c")
        store.save("a", engine, {"step": 1})
        expected = weights(engine)
        update(engine, "projector", 0)
        with pytest.raises(
            CheckpointError, match=r"the disk is full.*Needed about 2\.\d MiB.*free \d.*untouched.*room"
        ):
            store.save("b", engine, {"step": 2})
        assert names(disk / "c") == ["a"]
        assert store.load(store.latest(), engine) == {"step": 1}
        assert same(weights(engine), expected)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_size_limit(tmp_path):
    """The same without root: RLIMIT_FSIZE in a child makes the kernel refuse in mid-file."""
    code = """
        import resource, signal, sys
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from lrscale.parallel.checkpoint import CheckpointError, CheckpointStore
        from tests.unit.parallel.stand_in import small_engine
        store, engine = CheckpointStore(Path(sys.argv[1])), small_engine(width=300)
        store.save("a", engine, {"step": 1})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        try:
            store.save("b", engine, {"step": 2})
        except CheckpointError as error:
            print(error)
    """
    process = child(code, tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "checkpoint b could not be written: the file is too large" in output
    assert names(tmp_path) == ["a"]
    assert CheckpointStore(tmp_path).latest().name == "a"


def test_kill_in_mid_save(tmp_path):
    """kill -9 between writing and renaming: the former checkpoint loads, the next save cleans up."""
    code = """
        import sys, time
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from lrscale.parallel.checkpoint import CheckpointStore
        from lrscale.parallel.single import SingleEngine
        from tests.unit.parallel.stand_in import small_engine, update
        store, engine = CheckpointStore(Path(sys.argv[1])), small_engine()
        store.save("a", engine, {"step": 1})
        save = SingleEngine.save
        def slow(self, folder):
            save(self, folder)
            print("saving", flush=True)
            time.sleep(60)
        SingleEngine.save = slow
        update(engine, "base", 0)
        store.save("b", engine, {"step": 2})
    """
    process = child(code, tmp_path)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert names(tmp_path) == [".tmp-b", "a"]
    store, engine = CheckpointStore(tmp_path), small_engine()
    assert store.load(store.latest(), engine) == {"step": 1}
    store.save("c", engine, {"step": 2})
    assert names(tmp_path) == ["a", "c"]


def test_a_pointer_left_half_written_is_no_obstacle(tmp_path):
    """A disk that filled up while `latest` was written left a file that every later save tripped over."""
    store, engine = CheckpointStore(tmp_path), small_engine()
    (tmp_path / ".tmp-latest").write_text("step-1")
    (tmp_path / ".gone-step-0").mkdir()
    store.save("step-1", engine, {})
    assert names(tmp_path) == ["step-1"]
