"""The GPUs of a node: as many as the recipe asks for, free of memory errors, and able to compute."""

from __future__ import annotations

from typing import Any

import torch

from lrscale.config.diagnosis import Check
from lrscale.config.recipe import Recipe
from lrscale.parallel.ranks import Ranks

_SIZE = 1024
"""Side of the matrices that are multiplied, exactly."""
_FREE_SHARE = 0.8
"""What a CUDA context takes is far less than the rest."""


def check_gpus(recipe: Recipe, node: str) -> list[Check]:
    """GPUs that torch sees on this node, against the ranks that will share them out."""
    if recipe.model.device == "cpu":
        return [Check("GPUs", "not checked", "model.device is cpu", node=node)]
    seen, needed = torch.cuda.device_count(), recipe.ranks_per_node
    if not seen and recipe.model.device == "auto":
        return [Check("GPUs", "warning", "none: the run takes the CPU", help="set model.device: cuda", node=node)]
    names = sorted({torch.cuda.get_device_name(index) for index in range(seen)})
    found = f"{seen} x {' and '.join(names)}" if seen else f"none (torch {torch.__version__})"
    if seen < needed:
        return [
            Check(
                "GPUs",
                "failed",
                f"{found} visible",
                needed=f"{needed}, one a rank (cluster.gpus_per_node, parallel.ranks_per_node)",
                help="see nvidia-smi there and CUDA_VISIBLE_DEVICES; ask SLURM for them, or lower the numbers",
                node=node,
                blames_node=True,
            )
        ]
    return [Check("GPUs", "ok", found, node=node), *memory_errors(seen, node)]


def check_own_gpu(recipe: Recipe, ranks: Ranks, node: str) -> list[Check]:
    """Whether this rank's GPU multiplies: a broken one often shows up only here."""
    if recipe.model.device == "cpu" or ranks.local_rank >= torch.cuda.device_count():
        return []
    name = "GPU arithmetic"
    try:
        ones = torch.ones(_SIZE, _SIZE, device=torch.device("cuda", ranks.local_rank))
        wrong = int((ones @ ones != _SIZE).sum().item())
        free, total = torch.cuda.mem_get_info(ranks.local_rank)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    else:
        del ones
        torch.cuda.empty_cache()
        if not wrong and free > _FREE_SHARE * total:
            return [Check(name, "ok", "right on every GPU", node=node)]
        if not wrong:
            problem = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB are free: another process holds the rest"
        else:
            problem = f"{wrong} of {_SIZE**2} products are wrong"
    return [
        Check(
            name,
            "failed",
            f"GPU {ranks.local_rank}: {problem}",
            needed="a GPU that computes, its memory free",
            help="run nvidia-smi there, end stray processes, or report the GPU",
            node=node,
            blames_node=True,
        )
    ]


def memory_errors(count: int, node: str) -> list[Check]:
    """Uncorrected memory errors since the driver was loaded, and rows that could not be remapped, as NVML counts them."""
    name = "ECC"
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return [Check(name, "not checked", "the package nvidia-ml-py is not installed", node=node)]
    except pynvml.NVMLError as error:
        return [Check(name, "not checked", f"NVML, which nvidia-smi uses, is not here: {error}", node=node)]
    try:
        errors = [_errors_of(pynvml, str(torch.cuda.get_device_properties(index).uuid)) for index in range(count)]
    except pynvml.NVMLError_NotSupported:
        return [Check(name, "not checked", "these GPUs have no ECC, or it is off", node=node)]
    except pynvml.NVMLError as error:
        return [Check(name, "not checked", f"NVML does not tell: {error}", node=node)]
    finally:
        pynvml.nvmlShutdown()
    bad = [f"GPU {index}: {words}" for index, words in enumerate(errors) if words]
    if not bad:
        return [Check(name, "ok", "no uncorrected memory errors", node=node)]
    return [
        Check(
            name,
            "failed",
            "; ".join(bad),
            needed="none",
            help="reset the GPU (nvidia-smi --gpu-reset) or drain the node; see nvidia-smi -q -d ECC,ROW_REMAPPER",
            node=node,
            blames_node=True,
        )
    ]


def _errors_of(nvml: Any, uuid: str) -> str:
    # By UUID: torch counts the visible GPUs, NVML all of them.
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    uncorrected = nvml.nvmlDeviceGetTotalEccErrors(
        handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    )
    words = [f"{uncorrected} uncorrected ECC errors"] if uncorrected else []
    try:
        *_, pending, failure = nvml.nvmlDeviceGetRemappedRows(handle)
    except nvml.NVMLError_NotSupported:  # before Ampere
        return ", ".join(words)
    words += ["a row remapping is pending (the GPU needs a reset)"] if pending else []
    words += ["a row could not be remapped"] if failure else []
    return ", ".join(words)
