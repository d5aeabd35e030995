"""safetensors files of live tensors; failures of the disk as OSError, whoever reports them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_OS_ERROR = re.compile(r"os error (\d+)")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors exactly as they are. Raises OSError with its errno when the disk refuses."""
    try:
        save_file({name: _own_storage(tensor) for name, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error


def _own_storage(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its storage: safetensors refuses views that share one."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    return tensor
