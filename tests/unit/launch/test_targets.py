"""What evaluate and generate are pointed at."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lrscale.config.load import load_recipe, read_recipe
from lrscale.launch.errors import ExitCode, LaunchError
from lrscale.launch.rundir import create_run
from lrscale.launch.targets import evaluation_arguments, model_of


def refused(target: str, arm: str | None = None) -> ExitCode:
    with pytest.raises(LaunchError) as caught:
        model_of(target, arm)
    return caught.value.code


def test_a_run_stands_for_its_latent_arm(tmp_path: Path) -> None:
    run = create_run(load_recipe().recipe, tmp_path, []).path
    assert refused(str(run)) == ExitCode.NOT_FOUND
    (run / "models" / "discrete").mkdir(parents=True)
    assert model_of(str(run), None) == str(run / "models" / "discrete")
    (run / "models" / "latent").mkdir()
    assert model_of(str(run), None) == str(run / "models" / "latent")
    assert model_of(str(run), "discrete") == str(run / "models" / "discrete")
    assert refused(str(run), "zero_latent") == ExitCode.NOT_FOUND


def test_the_advice_goes_on_with_that_very_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks out a second run in ./runs, begun from the recipe of a run that lies elsewhere or was renamed."""
    kept = create_run(load_recipe().recipe, tmp_path / "old", []).path
    renamed = kept.rename(kept.parent / "my-run")
    (renamed / "metrics.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LaunchError, match="finish the run") as caught:
        model_of("old/my-run", None)
    command = str(caught.value).split("(", 1)[1].split(")")[0]
    words = shlex.split(command)
    assert words[:2] == ["lrscale", "launch"] and words[3::2] == ["--runs-dir", "--name"]
    run = create_run(load_recipe([words[2]], [f"name={words[6]}"]).recipe, Path(words[4]), [])
    assert (run.path, run.state) == (renamed, "unfinished")


def test_hub_ids_pass_and_typos_of_folders_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks out asking the hub for a mistyped run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert model_of("Qwen/Qwen3-4B", None) == "Qwen/Qwen3-4B"
    assert refused("runs/typo") == refused("./typo") == refused("/no/where") == refused("a b") == ExitCode.NOT_FOUND


def test_evaluate_takes_a_runs_own_recipe_unless_told_otherwise(tmp_path: Path) -> None:
    run = create_run(load_recipe((), ["seed=4"]).recipe, tmp_path, []).path
    with evaluation_arguments(str(run), [], []) as arguments:
        assert arguments == [str(run)]
    with evaluation_arguments(str(run), [], ["stages.evaluate.prompts=7"]) as arguments:
        recipe = read_recipe(Path(arguments[-1]))
    assert (recipe.seed, recipe.stages.evaluate.prompts) == (4, 7)
    assert not Path(arguments[-1]).exists()


def test_evaluate_puts_the_model_into_the_recipe(tmp_path: Path) -> None:
    with evaluation_arguments(str(tmp_path), ["smoke-1gpu"], []) as arguments:
        recipe = read_recipe(Path(arguments[-1]))
    assert (recipe.model.path, recipe.model.device) == (str(tmp_path), "cuda")
