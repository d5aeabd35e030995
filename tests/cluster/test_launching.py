"""`lrscale launch` in front of a real SLURM: what it refuses and how, what it writes, and what it never writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, Run, wait_until
from tests.distributed.ranks import ROOT

pytestmark = pytest.mark.slow

HELD = ["--set", "cluster.sbatch_flags=[--hold]"]
HOSTILE = "a'; touch x\n b%j $(touch y)"
SECRET = "squeamish-ossifrage-4711"
DIES_ON_RANK_1 = """
import os, pathlib, sys, threading, time
def leave():
    while not pathlib.Path(os.environ["LRSCALE_RUN_DIR"], "attempts/1/rank1.log").exists():
        time.sleep(0.1)
    time.sleep(1)
    pathlib.Path(os.environ["TOLD"]).write_text(os.environ["LRSCALE_SECRET"])
    os._exit(9)
if os.environ.get("RANK") == "1" and "worker" in sys.orig_argv:
    threading.Thread(target=leave, daemon=True).start()
"""


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--nodes", "40"], 3, "partition 'main' allows 4 nodes, 40 requested"),
        (["--nodes", "3"], 3, "do not divide over 6 ranks"),
        (["--partition", "mian", "--nodes", "2"], 3, "did you mean main?"),
        (["--nodes", "2", "--time", "1:x"], 3, "cluster.time_limit (overridden by --time)"),
        (["--nodes", "2", "--set", "cluster.memory=9G"], 3, "have 6000 MiB of memory, 9G requested"),
        (["--nodes", "2", "--set", "cluster.cpus_per_rank=9"], 3, "have 16 CPUs, 18 requested"),
        (["--nodes", "2", "--set", "cluster.partiton=x"], 3, "did you mean cluster.partition?"),
        (["--nodes", "2", "--set", "cluster.sbatch_flags=[--qos=none, --gres=gpu:9]"], 5, "refused"),
        (["--nodes", "2", "--set", "cluster.secrets=[LRSCALE_NOT_THERE]"], 4, "not in the environment"),
        (["--local", "--set", "cluster.nodes=2"], 3, "this machine is one node"),
    ],
)
def test_what_cannot_be_submitted_is_answered(
    cluster: Cluster, recipe: Path, tmp_path: Path, options: list[str], code: int, said: str
) -> None:
    done = cluster.lrscale("launch", str(recipe), *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr
    assert not list(tmp_path.rglob("jobs.jsonl"))


def test_a_dead_controller_is_for_later(dead_controller: Cluster, recipe: Path, tmp_path: Path) -> None:
    """Locks out minutes of silence, and a run directory that looks submitted; a dry run goes on without SLURM."""
    done = dead_controller.lrscale("launch", str(recipe), "--nodes", "2", cwd=tmp_path)
    assert done.returncode == 75 and "does not answer" in done.stderr and not (tmp_path / "runs").exists()


def test_a_dry_run_needs_no_slurm(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    """Everything is written, and what is shown is the same whether SLURM is there or not; nothing is submitted."""
    empty = tmp_path / "bin"
    empty.mkdir()
    (empty / "git").symlink_to(shutil.which("git") or "/usr/bin/git")
    said = {}
    for name, path in (("with", os.environ["PATH"]), ("without", str(empty))):
        options = ["--nodes", "2", "--dry-run", "--runs-dir", name, "--json"]
        done = cluster.lrscale("launch", str(recipe), *options, cwd=tmp_path, PATH=path)
        assert done.returncode == 0, done.stderr
        said[name] = json.loads(done.stdout)
        assert ("SLURM is not on this machine" in done.stderr) == (name == "without")
        assert "micro 2 x accumulation 1 x ranks 4 = 8 sequences" in done.stderr
        assert {path.name for path in (tmp_path / name / "tiny").iterdir()} == {
            "recipe.json", "manifest.json", "ds_config.json", "accelerate.yaml", "job.env", "job.sh",
        }  # fmt: skip
    assert said["with"] | {"run_dir": "", "sbatch": []} == said["without"] | {"run_dir": "", "sbatch": []}
    assert said["with"]["job_id"] is None


def test_the_plan_of_the_large_recipe_is_shown(cluster: Cluster, tmp_path: Path) -> None:
    """GPUs, memory and cost; the nodes of this cluster are far too small to load it, which SLURM would not say."""
    options = ["launch", "llama3-70b-8n8g", "--nodes", "4"]
    plan = cluster.lrscale(*options, "--dry-run", cwd=tmp_path, PATH=str(tmp_path))
    for words in ("4 x 8 = 32", "ranks 32 = 768 sequences", "1,536 GPU-hours", "of 80 GiB a GPU", "--gpus-per-node=8"):
        assert words in plan.stderr, plan.stderr
    refused = cluster.lrscale(*options, cwd=tmp_path)
    assert refused.returncode == 3 and "GiB of host memory a node" in refused.stderr


def test_slurm_is_asked_when_it_could_start(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    done = cluster.lrscale("launch", str(recipe), "--nodes", "2", "--test-only", cwd=tmp_path)
    assert done.returncode == 0 and "to start at" in done.stdout and "partition main" in done.stdout, done.stderr
    assert not (tmp_path / "runs" / "tiny" / "jobs.jsonl").exists()


@pytest.mark.parametrize("directive", ["gpus-per-node", "gres", "none"])
def test_gpus_are_asked_for_as_the_cluster_wants_it(cluster: Cluster, tmp_path: Path, directive: str) -> None:
    options = ["--slurm", "--test-only", "--set", f"cluster.gpu_directive={directive}", "--set", "cluster.memory=1G"]
    done = cluster.lrscale("launch", "smoke-1gpu", *options, cwd=tmp_path)
    assert done.returncode == 0 and "to start at" in done.stdout, done.stderr


def test_of_two_launches_at_once_one_is_submitted(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    """Locks out two jobs that write into one run directory, also when the first one still waits in the queue."""
    command = [sys.executable, "-m", "lrscale", "launch", str(recipe), "--nodes", "2", *HELD]
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=cluster.environment, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert sorted(process.returncode for process in both) == [0, 75], said
    (job,) = Run(cluster, tmp_path / "runs" / "tiny").jobs
    third = cluster.lrscale("launch", str(recipe), "--local", cwd=tmp_path)
    assert third.returncode == 75 and f"has a job already: {job['job_id']} (PENDING)" in third.stderr
    cluster.call("scancel", str(job["job_id"]))


def everything_written(run: Run) -> str:
    """All files of a run directory, and the command lines of its job wherever they can be seen."""
    texts = [path.read_bytes().decode(errors="replace") for path in run.path.rglob("*") if path.is_file()]
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:  # it has ended
            continue
    seen = [line for line in lines if "lrscale" in line]
    assert any("lrscale.parallel.agent" in line for line in seen), seen
    job = run.cluster.call("scontrol", "show", "job", "-dd", str(run.job_id))
    script = run.cluster.call("scontrol", "write", "batch_script", str(run.job_id), "-")
    return "\n".join([*texts, *seen, job, script])


def test_a_rank_that_crashes_ends_the_job_and_no_secret_is_written(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    """A real job in a folder with a hostile name: it fails with its reason, and the name runs no command.

    The rank dies without a word; the secret reaches it (it tells), and nothing else.
    """
    folder = tmp_path / HOSTILE
    folder.mkdir()
    (tmp_path / "sitecustomize.py").write_text(DIES_ON_RANK_1)
    options = ["--nodes", "2", "--set", "cluster.secrets=[LRSCALE_SECRET]"]
    options += ["--set", "parallel.ranks_per_node=1", "--set", "stages.traces.prompts=4", "--runs-dir", HOSTILE]
    secret = {"LRSCALE_SECRET": SECRET, "TOLD": str(tmp_path / "told"), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = cluster.lrscale("launch", str(recipe), *options, cwd=tmp_path, **secret)
    assert done.returncode == 0, done.stderr
    run = Run(cluster, folder / "tiny")
    assert run.job_id == int(done.stdout)
    written = done.stderr
    wait_until((run.attempt() / "rank0.log").is_file, f"its ranks: {run.logs()}")
    written += everything_written(run)
    ended = run.end()
    assert ended["state"] == "failed" and "made no checkpoint" in ended["reason"], (ended, run.logs())
    assert "error: rank 1 ended with exit code 9" in run.logs()
    assert (tmp_path / "told").read_text() == SECRET
    written += "\n".join(path.read_bytes().decode(errors="replace") for path in run.path.rglob("*") if path.is_file())
    assert SECRET not in written
    assert "LRSCALE_SECRET" in written
    assert not [path for path in (tmp_path, folder, run.path, ROOT) if (path / "x").exists() or (path / "y").exists()]


def test_the_plan_of_70b_imports_nothing_heavy(cluster: Cluster, tmp_path: Path) -> None:
    """Locks out torch, or a hub that is asked, on a login node: what is imported is looked at, for clocks are noisy."""
    heavy = ("torch", "transformers", "huggingface_hub", "accelerate", "deepspeed", "datasets")
    code = (
        "import sys, lrscale.cli\n"
        "sys.argv = ['lrscale', 'launch', 'llama3-70b-8n8g', '--dry-run']\n"
        "from lrscale.cli.app import app, _guarded\n"
        f"code = _guarded(app); print(code, *[name for name in {heavy!r} if name in sys.modules])"
    )
    env = cluster.environment | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0", done.stdout + done.stderr
