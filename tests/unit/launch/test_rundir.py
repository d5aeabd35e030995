"""Run directories: made once, resumed by the same recipe, never overwritten."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from lrscale.config.load import load_recipe, read_recipe
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.manifest import without_secrets
from lrscale.launch.rundir import after_failure, create_run, describe, inspect_run


def refusal(recipe_overrides: list[str], runs: Path) -> LaunchError:
    with pytest.raises(LaunchError) as caught:
        create_run(load_recipe((), recipe_overrides).recipe, runs, ["launch"])
    return caught.value


def test_a_run_directory_holds_the_resolved_recipe_and_its_origin(tmp_path: Path) -> None:
    recipe = load_recipe().recipe
    run = create_run(recipe, tmp_path / "runs", ["launch", "--set", "report.wandb_api_key=abc"])
    assert run.state == "new"
    assert sorted(path.name for path in run.path.iterdir()) == ["manifest.json", "recipe.json"]
    assert read_recipe(run.path / "recipe.json") == recipe
    text = (run.path / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["seed"] == recipe.seed and "torch" in manifest["versions"]
    assert "abc" not in text


def test_the_same_recipe_resumes_and_writes_nothing(tmp_path: Path) -> None:
    """Locks out a second launch that replaces what the first one wrote."""
    recipe = load_recipe().recipe
    path = create_run(recipe, tmp_path, []).path
    before = {file: file.read_bytes() for file in path.iterdir()}
    assert create_run(recipe, tmp_path, ["other"]).state == "unfinished"
    assert {file: file.read_bytes() for file in path.iterdir()} == before


def test_another_recipe_is_refused_with_every_difference(tmp_path: Path) -> None:
    """Locks out two experiments in one directory."""
    (create_run(load_recipe().recipe, tmp_path, []).path / "metrics.jsonl").write_text("{}")
    error = refusal(["seed=9", "report.html=false", "task={kind: flawed_fictions}"], tmp_path)
    assert error.code == ExitCode.BAD_RECIPE
    assert "seed: 0 there, 9 now" in str(error)
    assert 'task.kind: "flawed_stories" there, "flawed_fictions" now' in str(error)
    assert 'task.path: nothing there, "kahuja/flawed-fictions" now' in str(error)
    assert "--name" in str(error) and "report" not in str(error)


def test_a_run_that_has_made_nothing_takes_another_recipe(tmp_path: Path) -> None:
    """Locks out a name that is spent by a first try which failed before its first stage."""
    path = create_run(load_recipe().recipe, tmp_path, ["first"]).path
    (path / "metrics.jsonl").touch()
    (path / "attempts" / "1").mkdir(parents=True)
    changed = load_recipe((), ["seed=9"]).recipe
    assert inspect_run(changed, tmp_path).changes == ("seed: 0 there, 9 now",)
    assert read_recipe(path / "recipe.json").seed == 0
    run = create_run(changed, tmp_path, ["second"])
    assert read_recipe(path / "recipe.json") == changed
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["seed"], manifest["command"]) == (9, ["second"])
    assert describe(run).startswith(f"beginning {path}") and "seed: 0 there, 9 now" in describe(run)
    for made in ("traces", "checkpoints"):
        (path / made).mkdir()
        assert refusal(["seed=8"], tmp_path).code == ExitCode.BAD_RECIPE
        (path / made).rmdir()


def test_a_recipe_is_not_replaced_under_a_worker(tmp_path: Path) -> None:
    path = create_run(load_recipe().recipe, tmp_path, []).path
    with (path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refusal(["seed=9"], tmp_path).code == ExitCode.TRY_LATER
    assert read_recipe(path / "recipe.json").seed == 0


def test_what_the_report_shows_may_change_on_the_way(tmp_path: Path) -> None:
    """Locks out hours of training that cannot go on because a tracker was turned off."""
    path = create_run(load_recipe().recipe, tmp_path, ["first"]).path
    (path / "metrics.jsonl").write_text("{}")
    run = create_run(load_recipe((), ["report.html=false"]).recipe, tmp_path, ["second"])
    assert describe(run).startswith(f"going on with {path}") and "report.html: true there, false now" in describe(run)
    assert not read_recipe(path / "recipe.json").report.html
    assert json.loads((path / "manifest.json").read_text())["command"] == ["first"]


def test_where_a_run_runs_may_change_on_the_way(tmp_path: Path) -> None:
    """Locks out a resume on another number of ranks, which checkpoints allow."""
    path = create_run(load_recipe().recipe, tmp_path, []).path
    (path / "metrics.jsonl").write_text("{}")
    changed = load_recipe((), ["parallel.kind=zero3", "parallel.ranks_per_node=2", "checkpoints.keep_last=3"]).recipe
    run = create_run(changed, tmp_path, [])
    assert "parallel.ranks_per_node: null there, 2 now" in describe(run)
    assert read_recipe(path / "recipe.json") == changed


def test_a_bad_recipe_is_not_to_be_resumed(tmp_path: Path) -> None:
    """Locks out `resume with` under the worker's advice to mend the recipe."""
    run = create_run(load_recipe().recipe, tmp_path, [])
    assert "resume with" not in after_failure(run, 3, ["launch"])
    assert "resume with: lrscale launch" in after_failure(run, 6, ["launch"])


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    path = create_run(load_recipe().recipe, tmp_path, []).path
    (path / "done.json").write_text("{}")
    assert inspect_run(load_recipe().recipe, tmp_path).state == "finished"


@pytest.mark.parametrize("note", ['{"pid": 4711, "host": "node7"}', "pid 4711 on node7", "", "\xff{"])
def test_a_held_lock_is_try_again_later(tmp_path: Path, note: str) -> None:
    """Locks out two workers in one run directory, whatever the holder wrote."""
    path = create_run(load_recipe().recipe, tmp_path, []).path
    with (path / "lock").open("w", encoding="utf-8") as lock:
        lock.write(note)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = refusal([], tmp_path)
    assert error.code == 75 and "in use" in str(error)
    assert ("4711" in str(error) and "node7" in str(error)) or "4711" not in note
    assert create_run(load_recipe().recipe, tmp_path, []).state == "unfinished"


def test_a_lock_file_nobody_holds_is_no_lock(tmp_path: Path) -> None:
    """Locks out runs that stay blocked after a kill -9."""
    path = create_run(load_recipe().recipe, tmp_path, []).path
    (path / "lock").write_text('{"pid": 1, "host": "gone"}')
    assert create_run(load_recipe().recipe, tmp_path, []).state == "unfinished"


def test_folders_that_are_no_runs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tiny-cpu").mkdir()
    (tmp_path / "tiny-cpu" / "thesis.tex").write_text("")
    assert refusal([], tmp_path).code == ExitCode.PREFLIGHT
    (tmp_path / "file").write_text("")
    assert refusal(["name=file"], tmp_path).code == ExitCode.PREFLIGHT
    assert refusal([], tmp_path / "file").code == ExitCode.PREFLIGHT


def test_a_creation_cut_short_is_made_good(tmp_path: Path) -> None:
    """Locks out a directory that neither begins nor resumes because a launch died between two files."""
    folder = tmp_path / "tiny-cpu"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / ".recipe.json.1.tmp").write_text("{")
    assert create_run(load_recipe().recipe, tmp_path, []).state == "new"
    assert read_recipe(folder / "recipe.json") == load_recipe().recipe


def test_a_damaged_recipe_json_is_refused(tmp_path: Path) -> None:
    path = create_run(load_recipe().recipe, tmp_path, []).path
    (path / "recipe.json").write_text('{"sed": 3}')
    error = refusal([], tmp_path)
    assert error.code == ExitCode.BAD_RECIPE and "unknown key sed" in str(error)


def test_secrets_stay_out_of_the_manifest() -> None:
    command = [
        "launch",
        "--set",
        "a.hf_token=x1",
        "--token",
        "x2",
        "--max-new-tokens",
        "5",
        "optimisation.micro_batch_tokens=4096",
        "https://me:x3@host/a",
        "hf_x4x4x4x4x4",
    ]
    shown = without_secrets(command)
    assert not any(secret in " ".join(shown) for secret in ("x1", "x2", "x3", "x4"))
    assert shown[5:8] == ["--max-new-tokens", "5", "optimisation.micro_batch_tokens=4096"]
