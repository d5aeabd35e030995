"""What a DeepSpeed configuration gets from the model's width and from the device, once these are known.

The launcher knows them for most recipes; the ranks do for all. Both call `settle`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

AUTO = "auto"
WIDTH_KEYS = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
)
DEVICE_KEYS = (
    "zero_optimization.overlap_comm",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.offload_param.pin_memory",
)


def width_values(hidden_size: int) -> dict[str, int]:
    """Bucket sizes and the largest tensor that stays whole, in elements, by dotted key (accelerate's rules)."""
    square = hidden_size * hidden_size
    return dict(zip(WIDTH_KEYS, (square, square * 9 // 10, 10 * hidden_size), strict=True))


def settle(config: Mapping[str, Any], *, hidden_size: int | None, on_gpu: bool | None) -> dict[str, Any]:
    """A copy of `config` with the values that follow from what is known; None leaves the "auto" that need it.

    On a CPU, what needs a GPU is off whatever the file says: DeepSpeed's own defaults switch it on.
    """
    settled = copy.deepcopy(dict(config))
    if hidden_size is not None:
        for key, value in width_values(hidden_size).items():
            if value_at(settled, key) == AUTO:
                put(settled, key, value)
    if on_gpu is not None:
        for key in DEVICE_KEYS:
            # Absent counts as DeepSpeed's default, which is true, where its section is there.
            if value_at(settled, key) == AUTO or (not on_gpu and has_section(settled, key)):
                put(settled, key, on_gpu)
    return settled


def unsettled(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys that still read "auto"."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from unsettled(value, f"{prefix}{name}.")
        elif value == AUTO:
            yield prefix + name


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, None where it is absent."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def has_section(config: Mapping[str, Any], key: str) -> bool:
    """Whether there is a mapping for a dotted key to be in."""
    return isinstance(value_at(config, key.rpartition(".")[0]), Mapping)


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key, making the sections on the way."""
    *sections, name = key.split(".")
    for part in sections:
        config = config.setdefault(part, {})
    config[name] = value
