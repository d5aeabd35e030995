"""The sbatch line and the files of a job, golden and under hostile names; what is refused before SLURM is asked."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from lrscale.config.errors import RecipeError
from lrscale.config.hardware import load_machine
from lrscale.config.load import LoadedRecipe, load_recipe
from lrscale.launch import on_slurm, submission
from lrscale.launch.cluster_fit import require_fit, require_sound
from lrscale.launch.errors import LaunchError
from lrscale.launch.job import dims_of
from lrscale.launch.job_env import job_env
from lrscale.launch.planning import plan_of
from lrscale.launch.slurm import Partition
from lrscale.plan.memory import memory_plan
from lrscale.plan.summary import count, plan_lines

HOSTILE = Path("/tmp/a'; touch x\n b%j $(id)")
TINY = ["parallel.kind=zero3", "parallel.ranks_per_node=2"]


def large(*overrides: str) -> LoadedRecipe:
    return load_recipe(["llama3-70b-8n8g"], overrides, slurm=True)


def line(*overrides: str, run_dir: Path = Path("/runs/x")) -> list[str]:
    return submission.sbatch_command(large(*overrides).recipe, run_dir)


def test_the_line_is_exactly_this() -> None:
    assert line("cluster.partition=h100", "cluster.account=me", "cluster.exclude=[n7]", "cluster.sbatch_flags=[--qos=x]")[
        :-2
    ] == [
        "sbatch", "--job-name=llama3-70b-8n8g", "--output=/runs/x/slurm-%j.log", "--open-mode=append", "--export=ALL",
        "--requeue", "--signal=B:USR2@1800", "--nodes=8", "--ntasks-per-node=1", "--exclusive", "--mem=0",
        "--gpus-per-node=8", "--partition=h100", "--account=me", "--time=2-00:00:00", "--exclude=n7", "--qos=x",
    ]  # fmt: skip


def test_the_gpu_directive_and_memory_are_settings_of_the_cluster() -> None:
    assert "--gres=gpu:8" in line("cluster.gpu_directive=gres")
    assert not [word for word in line("cluster.gpu_directive=none") if "gpu" in word and "llama" not in word]
    shared = line("cluster.memory=200G", "cluster.cpus_per_rank=4")
    assert "--mem=200G" in shared and "--cpus-per-task=32" in shared and "--exclusive" not in shared


def test_roles_share_the_job_or_are_components_of_it() -> None:
    roles = "cluster.split.roles=[{name: rollout, nodes: 2, command: x}]"
    assert "--nodes=10" in line(roles) and ":" not in line(roles)
    parts = line(roles, "cluster.split.heterogeneous=true")
    assert "--nodes=8" in parts[: parts.index(":")] and "--nodes=2" in parts[parts.index(":") :]


def test_sequences_longer_than_the_model_are_refused_by_the_plan_and_named_by_launch(tmp_path: Path) -> None:
    """Locks out a plan of sequences that the ranks refuse. What launch knows are limits, not how long prompts are."""
    long = large("task.max_prompt_tokens=130000")
    with pytest.raises(RecipeError) as caught:
        plan_of(long, load_machine())
    (problem,) = caught.value.problems
    assert problem.key == "task.max_prompt_tokens" and "--set task.max_prompt_tokens=129024" in problem.help
    said = "132048 positions (task.max_prompt_tokens 130000 + rollout.max_new_tokens 2048)"
    assert said in problem.message and "meta-llama/Llama-3.3-70B-Instruct has 131072" in problem.message
    for loaded, warned in ((long, True), (large("task.max_prompt_tokens=129024"), False)):
        planned = on_slurm.plan(loaded, tmp_path, dry=True, say=[].append)
        assert any(said in line for line in planned.lines) == warned


def test_launch_and_plan_count_the_same_projector() -> None:
    """Locks out the gain of the kinds with norms left out of one of them."""
    recipe = load_recipe((), ["projector.kind=normalised"]).recipe
    dims = dims_of("builtin:tiny")
    assert dims is not None
    lines = "\n".join(plan_lines(recipe, dims, None, None))
    assert f"{count(dims.projector_parameters(recipe.projector.layers, 'normalised'))} of the projector" in lines


def test_hostile_names_stay_one_word(tmp_path: Path) -> None:
    """Locks out a shell that runs what a folder is called, and % that SLURM takes for a pattern."""
    command = line('cluster.partition="a\'; touch x"', run_dir=HOSTILE)
    assert command[-1] == str(HOSTILE) and "--partition=a'; touch x" in command
    assert f"--output={str(HOSTILE).replace('%', '%%')}/slurm-%j.log" in command
    text = job_env(large().recipe, HOSTILE, python="/p'y", share=HOSTILE)
    (tmp_path / "job.env").write_text(text)
    script = f'source {shlex.quote(str(tmp_path / "job.env"))}; printf %s "$share"'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == str(HOSTILE) and not (tmp_path / "x").exists()
    files = submission.submission_files(large(), HOSTILE)
    assert shlex.split(files["job.sh"].partition("waiting.\n")[2])[-1] == str(HOSTILE)


@pytest.mark.parametrize("name", ["a'; touch x", "a b", "a\n", "a\nb", "../x", ""])
def test_hostile_run_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="name is"):
        load_recipe((), [f"name={json.dumps(name)}"])


def test_containers_see_the_run_directory() -> None:
    env = job_env(
        large("cluster.container={kind: apptainer, image: /x.sif, mounts: [/data:/data]}").recipe,
        Path("/runs/x"), python="/venv/python", share=Path("/s"),
    )  # fmt: skip
    assert "container_command=(apptainer exec --nv --bind /runs/x --bind /s --bind /data:/data /x.sif)" in env
    assert "python=python3" in env and "container_flags=()" in env
    pyxis = job_env(
        large("cluster.container={kind: pyxis, image: /x.sqsh}", "cluster.secrets=[HF_TOKEN]").recipe,
        Path("/runs/x"), python="/venv/python", share=Path("/s"),
    )  # fmt: skip
    assert "container_flags=(--container-image=/x.sqsh --container-mounts=/runs/x:/runs/x,/s:/s" in pyxis
    assert "--container-env=HF_TOKEN" in pyxis


def test_a_secret_has_to_be_there_and_stays_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = large("cluster.secrets=[LRSCALE_TEST_A, LRSCALE_TEST_B]")
    monkeypatch.setenv("LRSCALE_TEST_A", "value-of-a")
    with pytest.raises(LaunchError) as caught:
        submission.require_secrets(loaded)
    assert "not in the environment: LRSCALE_TEST_B" in str(caught.value) and caught.value.code == 4
    monkeypatch.setenv("LRSCALE_TEST_B", "value-of-b")
    submission.require_secrets(loaded)


@pytest.mark.parametrize("flag", ["--export=HF_TOKEN=x", "--nodes=3", "-N3\n", "qos", "--wrap=x", "--exclude=n1"])
def test_flags_that_other_keys_decide_are_refused(flag: str) -> None:
    with pytest.raises(RecipeError, match="cannot stand here"):
        large(f"cluster.sbatch_flags={json.dumps([flag])}")


H100 = Partition(
    "h100", default=True, up=True, nodes=16, nodes_usable=16, max_nodes=None, max_time_s=86_400, gpus_per_node=8,
    cpus_per_node=128, memory_mib=2_000_000,
)  # fmt: skip
CPU = Partition(
    "cpu", default=False, up=True, nodes=99, nodes_usable=99, max_nodes=None, max_time_s=None, gpus_per_node=0,
    cpus_per_node=64, memory_mib=200_000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.nodes=24"], ["partition 'h100' allows 16 nodes, 24 requested", "--nodes 16, or --partition cpu"]),
        (["cluster.partition=h10"], ["no partition 'h10'", "did you mean h100?"]),
        (["cluster.time_limit=2-00:00:00"], ["allows 1-00:00:00, 2-00:00:00 requested", "--partition cpu"]),
        (["cluster.gpus_per_node=16"], ["have 8 GPUs, 16 requested"]),
        (["cluster.cpus_per_rank=17"], ["have 128 CPUs, 136 requested", "cluster.cpus_per_rank=16"]),
        (["cluster.memory=3T"], ["have 2000000 MiB of memory, 3T requested"]),
        (["cluster.partition=cpu"], ["have 0 GPUs, 8 requested", "--partition h100"]),
        (["cluster.memory=10G"], ["the run takes about 32 GiB of host memory a node (checkpoint)"]),
    ],
)
def test_what_is_beyond_the_cluster_is_told_with_a_way_out(overrides: list[str], said: list[str]) -> None:
    loaded = large("cluster.time_limit=8:00:00", *overrides)
    memory = memory_plan(loaded.recipe, dims_of(loaded.recipe.model.path))  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as caught:
        require_fit(loaded, {"h100": H100, "cpu": CPU}, memory)
    for words in said:
        assert words in str(caught.value)


def test_what_fits_passes() -> None:
    loaded = large("cluster.time_limit=8:00:00")
    memory = memory_plan(loaded.recipe, dims_of(loaded.recipe.model.path))  # type: ignore[arg-type]
    require_fit(loaded, {"h100": H100, "cpu": CPU}, memory)
    require_sound(loaded, memory)


def test_what_no_cluster_could_run_is_refused() -> None:
    """Locks out a run that is asked to save before it has begun, and states that no GPU holds."""
    loaded = large("cluster.time_limit=10:00", "cluster.nodes=1")
    memory = memory_plan(loaded.recipe, dims_of(loaded.recipe.model.path))  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as caught:
        require_sound(loaded, memory)
    assert "cluster.drain_s is 1800" in str(caught.value) and "parallel.offload_optimizer" in str(caught.value)


def test_resolved_recipes_hold_no_auto(tmp_path: Path) -> None:
    """Locks out a value that each rank would have to guess, and nodes that the files do not follow."""
    for nodes in (4, 8):
        planned = on_slurm.plan(large(f"cluster.nodes={nodes}"), tmp_path, dry=True, say=lambda text: None)
        run = on_slurm.write(planned, tmp_path, ["launch"], dry=True)
        files = {path.name: path.read_text() for path in run.path.iterdir()}
        assert '"auto"' not in files["recipe.json"] + files["ds_config.json"]
        assert json.loads(files["ds_config.json"])["train_batch_size"] == nodes * 8
        assert f"num_processes: {nodes * 8}" in files["accelerate.yaml"] and f"\nnodes={nodes}\n" in files["job.env"]


def test_a_run_that_was_copied_from_a_cluster_goes_on_without_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks out a laptop on which a run cannot be resumed, for nobody there knows what became of its job."""
    (tmp_path / "jobs.jsonl").write_text('{"job_id": 7, "submitted": 1.0, "nodes": 2, "sbatch": null}\n')
    monkeypatch.setenv("PATH", str(tmp_path))
    submission.require_no_job(tmp_path)
