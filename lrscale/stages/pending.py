"""Rollouts whose scores were still out when a run was stopped, kept on disk and scored when it goes on.

    pending/rank0-3f9c...-a12b....safetensors     what was sampled, and by which reward it was scored so far

A rollout is used again only where everything that decided it is the same (`identity`): policy version, prompts,
sampling plan, ranks. Sampling starts over unless all rollouts of all ranks are there: rows decoded beside other rows
differ in their last bits, and a resumed run is exact. Their scores are used again even then, where the same tokens
come out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lrscale.records import Score
from lrscale.stages.exchange import Sample, from_bytes, to_bytes
from lrscale.stages.rollout_io import write_whole


class PendingRollouts:
    """This rank's file of them; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self._folder = folder
        self._rank = rank

    def load(self, identity: Mapping[str, Any], fingerprint: str) -> dict[int, Sample]:
        """What an earlier attempt left of the same samples; scores only where the same reward gave them."""
        found = {}
        for path in self._files(f"{_short(identity)}-*"):
            with suppress(OSError):
                found = from_bytes(path.read_bytes())
                if path.stem.rpartition("-")[2] != fingerprint[:16]:
                    found = {index: Sample(sample.rollout, None) for index, sample in found.items()}
        return found

    def keep(self, identity: Mapping[str, Any], fingerprint: str, samples: Mapping[int, Sample]) -> None:
        """Replace what was kept before. A failed score counts as none: what failed is tried again."""
        if self._folder is None or not samples:
            return
        path = self._folder / f"rank{self._rank}-{_short(identity)}-{fingerprint[:16]}.safetensors"
        kept = {
            index: Sample(sample.rollout, sample.score if isinstance(sample.score, Score) else None)
            for index, sample in samples.items()
        }
        write_whole(path, to_bytes(kept))
        for other in self._files("*"):
            if other != path:
                other.unlink(missing_ok=True)

    def clear(self, identity: Mapping[str, Any]) -> None:
        """These samples are scored. What was kept of a later step waits until the run gets there again."""
        for path in self._files(f"{_short(identity)}-*"):
            path.unlink(missing_ok=True)

    def _files(self, pattern: str) -> list[Path]:
        return [] if self._folder is None else sorted(self._folder.glob(f"rank{self._rank}-{pattern}.safetensors"))


def _short(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
