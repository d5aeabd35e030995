"""Reads a run directory's accelerate.yaml and ds_config.json as accelerate and DeepSpeed do, with as many ranks.

python -m tests.distributed.programs.emitted RUN_DIR...
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from deepspeed.runtime.config import DeepSpeedConfig

from lrscale.parallel.start import prepare_deepspeed


def launcher(run_dir: Path) -> dict[str, object]:
    """What accelerate makes of its file, with the command line of launchers/node.sh."""
    given = ["--config_file", str(run_dir / "accelerate.yaml"), "--machine_rank", "1", "--main_process_ip", "n1"]
    given += ["--main_process_port", "20000", "--rdzv_backend", "static", "--same_network", "--module", "x"]
    parsed, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert defaults is not None
    kept = ("num_machines", "num_processes", "machine_rank", "multi_gpu", "use_deepspeed", "mixed_precision")
    names = (*kept, "rdzv_backend", "same_network", "deepspeed_multinode_launcher", "use_cpu")
    return {name: getattr(parsed, name) for name in names}


def engine(run_dir: Path, world_size: int) -> dict[str, object]:
    """What DeepSpeed makes of its file among so many ranks."""
    config = DeepSpeedConfig(str(run_dir / "ds_config.json"), mpu=ManyRanks(world_size))
    zero = config.zero_config
    return {
        "world_size": config.world_size,
        "train_batch_size": config.train_batch_size,
        "stage": int(zero.stage),
        "reduce_bucket_size": int(zero.reduce_bucket_size),
        "prefetch": int(zero.prefetch_bucket_size),
        "persistence": int(zero.param_persistence_threshold),
    }


@dataclass(frozen=True)
class ManyRanks:
    """DeepSpeed's door for launchers that know better than the process group how many ranks there are."""

    count: int

    def get_data_parallel_world_size(self) -> int:
        return self.count


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    prepare_deepspeed(timedelta(seconds=60))
    for word in sys.argv[1:]:
        run_dir = Path(word)
        found: dict[str, object] = {"name": run_dir.name, "launcher": launcher(run_dir)}
        if (run_dir / "ds_config.json").is_file():
            ranks = yaml.safe_load((run_dir / "accelerate.yaml").read_text())["num_processes"]
            found["engine"] = engine(run_dir, ranks)
        print("emitted " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
