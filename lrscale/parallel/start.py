"""The process group of a job: joined before anything is loaded, left when all is done."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from lrscale.config.recipe import Recipe
from lrscale.parallel.ranks import Ranks, set_threads, take_launcher, tell_libraries

_PR_SET_PDEATHSIG = 1
_ORPHANED = 128 + signal.SIGKILL


def start_process_group(recipe: Recipe) -> Ranks:
    """Join the other ranks: gloo on a CPU; on GPUs NCCL, with gloo for what lies in CPU memory.

    `kind: single` joins nothing. The other kinds have a process group for one rank as well. DeepSpeed is imported,
    and shares the group, for `kind: zero3` alone.

    Raises:
        ValueError: on every rank: another number of ranks was started, or a node has fewer GPUs than ranks.
    """
    ranks, parallel = Ranks.from_environment(), recipe.parallel
    if ranks.world_size != recipe.world_size:
        raise ValueError(
            f"the recipe asks for {recipe.world_size} ranks (cluster.nodes x parallel.ranks_per_node), but WORLD_SIZE "
            f"is {ranks.world_size}: start it with `lrscale launch`"
        )
    if parallel.kind == "single":
        return ranks
    on_gpu = recipe.model.device != "cpu" and torch.cuda.is_available()
    if on_gpu and recipe.ranks_per_node > torch.cuda.device_count():
        raise ValueError(
            f"{recipe.ranks_per_node} ranks on this node need as many GPUs, {torch.cuda.device_count()} are visible: "
            "lower cluster.gpus_per_node (or parallel.ranks_per_node), or make more visible (CUDA_VISIBLE_DEVICES)"
        )
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank)
    if ranks.world_size > 1:
        set_threads(parallel.threads or 1)
        _end_with_parent()
    tell_libraries(ranks, on_gpu=on_gpu)
    timeout = timedelta(seconds=parallel.collective_timeout_s)
    backend = "cuda:nccl,cpu:gloo" if on_gpu else "gloo"
    if ranks.world_size == 1:  # no launcher, no address to meet at
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    if parallel.kind == "zero3":
        prepare_deepspeed(timeout)
    return ranks


def stop_process_group() -> None:
    """Leave the group, once every rank is done: it waits for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare_deepspeed(timeout: timedelta) -> None:
    """Import DeepSpeed quietly and hand it torch's process group, which there must be.

    Raises:
        ValueError: DeepSpeed is not installed; it comes for Linux alone.
    """
    logging.disable(logging.INFO)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ValueError(
            f"parallel.kind zero3 needs deepspeed, which cannot be imported ({error}): install it (Linux), or set "
            "parallel.kind: fsdp2 or single"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    # Its own handler writes to stdout, which is for machines. Whoever keeps the run's log listens to this name.
    logging.getLogger("DeepSpeed").handlers.clear()
    # Would be compiled for a minute, with ninja or not at all. It serves tensor-parallel inference on a CPU only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timeout, verbose=False, auto_mpi_discovery=False)


def _end_with_parent() -> None:
    """A rank whose launcher is killed dies too: it sits in a process group of its own, where no signal finds it.

    One whose launcher is dead already, as no signal will tell, would wait for the others for an hour.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    launcher = take_launcher()
    if launcher is not None and os.getppid() != launcher:
        os._exit(_ORPHANED)
