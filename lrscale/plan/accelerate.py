"""accelerate.yaml: what accelerate, as a mere launcher of processes, reads from its file, and nothing else."""

from __future__ import annotations


def accelerate_yaml(nodes: int, ranks_per_node: int) -> str:
    """For `accelerate launch` on each of the nodes; rank, address and port of a node are said on the command line.

    MULTI_GPU means processes over torchrun, on CPUs as on GPUs: MULTI_CPU would start one process without MPI, and
    DEEPSPEED would hand accelerate the engine, which lrscale holds itself (ds_config.json). Should somebody switch to
    it by hand, `standard` keeps pdsh from writing the environment, secrets included, into a file. Keys that accelerate
    ignores in its file (rdzv_backend, same_network) are left out. With this file named, none in the user's cache is
    read.
    """
    return (
        "compute_environment: LOCAL_MACHINE\n"
        "distributed_type: MULTI_GPU\n"
        f"num_machines: {nodes}\nmachine_rank: 0\nnum_processes: {nodes * ranks_per_node}\n"
        "mixed_precision: 'no'\nuse_cpu: false\ndebug: false\n"
        "deepspeed_config:\n  deepspeed_multinode_launcher: standard\n"
    )
