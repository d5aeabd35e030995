"""Jobs whose ranks are a line of shell, so that they take a second; all around them is real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.cluster.conftest import Cluster, Run, wait_until

SAVES = 'mkdir -p "$R/checkpoints/latent"; echo "step-$N" >"$R/checkpoints/latent/latest"; '
DRAINS = """
until [[ -e $A/drain ]]; do sleep 0.1; done
[[ $SLURM_PROCID != 0 ]] || echo "{}" >"$A/checkpointed"
until [[ -e $A/checkpointed ]]; do sleep 0.1; done
exit 130"""
RUNS = "touch $A/ready; sleep 600"
OTHERS = "cluster.exclude=[node1, node2]"
"""Away from the node that a test takes down."""


class Scripted:
    """Starts jobs of real run directories whose ranks are a line of shell."""

    def __init__(self, cluster: Cluster, folder: Path, recipe: Path) -> None:
        self.cluster, self.folder, self.recipe = cluster, folder, recipe

    def start(self, name: str, ranks: str, *settings: str, nodes: int = 2) -> Run:
        """In the line, R is the run directory, N the attempt's number and A its folder."""
        options = [word for setting in settings for word in ("--set", setting)]
        done = self.cluster.lrscale(
            "launch", str(self.recipe), "--nodes", "2", "--name", name, "--dry-run", *options, cwd=self.folder
        )
        assert done.returncode == 0, done.stderr
        run = Run(self.cluster, self.folder / "runs" / name)
        script = run.path / "ranks"
        script.write_text(f"#!/bin/bash\nR=$LRSCALE_RUN_DIR N=$LRSCALE_ATTEMPT A=$R/attempts/$N\n{ranks}\n")
        script.chmod(0o755)
        env = run.path / "job.env"
        env.write_text(re.sub(r"^python=.*", f"python={shlex.quote(str(script))}", env.read_text(), flags=re.MULTILINE))
        line = (run.path / "job.sh").read_text().replace("--nodes=2", f"--nodes={nodes}")
        said = self.cluster.call("sh", "-c", line)
        (run.path / "jobs.jsonl").write_text(f'{{"job_id": {said.split()[-1]}}}\n')
        return run


def ready(run: Run, number: int = 1) -> int:
    """Waits until the ranks of an attempt run; the job's id."""
    path = run.attempt(number) / "ready"
    wait_until(path.is_file, f"{path}: {run.logs(number)}", timeout_s=60)
    return run.job_id
