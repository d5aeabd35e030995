"""safetensors files of live tensors; failures of the disk as OSError, whoever reports them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_OS_ERROR = re.compile(r"os error (\d+)")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors exactly as they are. Raises OSError with its errno when the disk refuses."""
    try:
        save_file({name: _own_storage(tensor) for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. Raises ValueError for a file that is not whole."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); use another checkpoint") from error


def _own_storage(tensor: Tensor) -> Tensor:
    """Contiguous, and alone in its storage: safetensors refuses views that share one."""
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    return tensor
