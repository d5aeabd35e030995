"""A run directory as a job leaves it, made by hand, and a cluster that knows one job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lrscale.launch import slurm
from lrscale.launch.status import Cluster

NOW = 1_800_000_000.0


class RunFolder:
    def __init__(self, path: Path, **stages: Any) -> None:
        self.path = path
        path.mkdir(parents=True)
        recipe = {
            "name": path.name,
            "parallel": {"ranks_per_node": 2},
            "cluster": {"nodes": 2},
            "stages": {"rl": {"arms": ["latent", "discrete"], "steps": 20}, "traces": {}, **stages},
        }
        self.write("recipe.json", recipe)

    def write(self, name: str, value: Any) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value if isinstance(value, str) else json.dumps(value))

    def submitted(self, *job_ids: int) -> None:
        lines = [{"job_id": job_id, "submitted": NOW - 100, "nodes": 2, "sbatch": None} for job_id in job_ids]
        self.write("jobs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def began(self, number: int, job_id: int | None = None, **marks: Any) -> Path:
        """An attempt; marks are files of it without their suffix: end={"state": ...}."""
        folder = self.path / "attempts" / str(number)
        folder.mkdir(parents=True)
        if job_id is not None:
            nodes = {"nodes": ["node1", "node2"], "started": NOW - 90}
            self.write(f"attempts/{number}/job.json", {"job_id": job_id, "restart_count": number - 1, **nodes})
        for name, value in marks.items():
            self.write(f"attempts/{number}/{name.replace('_', '-')}.json", value)
        return folder

    def metrics(self, *lines: dict[str, Any]) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


class KnownJob(Cluster):
    """A cluster with this job, or without any; it counts the questions."""

    def __init__(self, job: slurm.Job | None = None) -> None:
        super().__init__()
        self.job = job
        self.asked = 0

    def find_job(self, job_id: int) -> slurm.Job | None:
        self.asked += 1
        return self.job if self.job is not None and self.job.job_id == job_id else None


class SilentCluster(Cluster):
    """No answer."""

    def find_job(self, job_id: int) -> slurm.Job | None:
        self.unanswered = "SLURM's controller does not answer (squeue: no answer in 10 s)"
        raise slurm.SlurmUnreachable("squeue", "no answer in 10 s")
