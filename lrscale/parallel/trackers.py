"""TensorBoard and Weights & Biases through accelerate's trackers; metrics.jsonl is written elsewhere, always.

Trackers only ever append: steps that a resumed run takes again reach them twice. metrics.jsonl, which is cut back
to the checkpoint, holds each step once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

TrackerName = Literal["tensorboard", "wandb"]

_SECRET_WORDS = {"token", "secret", "password", "key", "apikey", "credential", "credentials"}
"""Last words of keys that are never sent; `max_new_tokens` and `token_ratio` end in others."""


class Trackers:
    """Sends each metrics object to every tracker, its keys prefixed with the stage and arm."""

    def __init__(self, trackers: Sequence[GeneralTracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Numbers of one metrics object (see metrics.jsonl); everything else is left to that file.

        Steps start again with each stage and arm, which wandb would drop: there the step goes in
        as a value, `STAGE/ARM/step`.
        """
        prefix = "/".join(str(metrics[key]) for key in ("stage", "arm") if metrics.get(key))
        numbers = {
            f"{prefix}/{key}" if prefix else key: value
            for key, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
        }
        if not numbers:
            return
        for tracker in self._trackers:
            if tracker.name == "wandb":
                tracker.log({**numbers, f"{prefix}/step" if prefix else "lrscale_step": step})
            else:
                tracker.log(numbers, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def open_trackers(names: Sequence[TrackerName], project: str, run_dir: Path, config: Mapping[str, Any]) -> Trackers:
    """Trackers of one run, named after its folder; a resumed run goes on in the same place.

    config: the recipe, nested as it is; sent flat, without values whose key names a secret.

    Raises ValueError for an unknown tracker or one whose package is missing.
    """
    run_dir = Path(run_dir)
    flat = _flat(config)
    for name in names:
        if name not in ("tensorboard", "wandb"):
            raise ValueError(f"report.trackers: given {name!r}, allowed are tensorboard, wandb")
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"report.trackers asks for {name}, which is not installed: pip install {name}, or take it off the list"
            )
    return Trackers([_open(name, project, run_dir, flat) for name in names])


def _open(name: TrackerName, project: str, run_dir: Path, flat: dict[str, Any]) -> GeneralTracker:
    if name == "tensorboard":
        tracker = TensorBoardTracker(project, logging_dir=run_dir / "tensorboard")
    else:
        # mode and keys are wandb's own business (WANDB_MODE, wandb login): nothing of them passes through here
        tracker = WandBTracker(project, name=run_dir.name, id=run_id(run_dir), resume="allow", dir=str(run_dir))
    tracker.start()
    tracker.store_init_configuration(flat)
    return tracker


def run_id(run_dir: Path) -> str:
    """One and the same for each launch of a run, another for a run of the same name in another folder."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys, values as trackers take them: bool, number or text."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            values.update(_flat(value, f"{prefix}{key}."))
        elif _names_a_secret(str(key)):
            continue
        elif isinstance(value, bool | int | float | str):
            values[prefix + str(key)] = value
        else:
            values[prefix + str(key)] = json.dumps(value, default=str)
    return values


def _names_a_secret(key: str) -> bool:
    return key.lower().replace("-", "_").split("_")[-1] in _SECRET_WORDS
