"""What lrscale tells a vLLM engine when it starts it, as the entry `lrscale` of vLLM's `additional_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

_ENTRY = "lrscale"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Read in each worker."""

    latents_folder: str | None = None
    """Where `LatentWorker.take_latents` writes; None: latents are not recorded."""
    fixed_decode: bool = False
    """Decode as a CUDA graph would record it, on any device: the work does not depend on values. For tests."""

    @classmethod
    def read(cls, additional_config: Any) -> EngineOptions:
        """Raises ValueError for an option there is not."""
        given = additional_config.get(_ENTRY, {}) if isinstance(additional_config, Mapping) else {}
        known = [option.name for option in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"additional_config[{_ENTRY!r}] has no option {unknown[0]!r}; it has {', '.join(known)}")
        return cls(**given)

    def additional_config(self) -> dict[str, Any]:
        """For vLLM's engine arguments."""
        return {_ENTRY: asdict(self)}
