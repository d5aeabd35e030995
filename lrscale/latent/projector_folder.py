"""A Reasoning Projector in a folder of its own: what a run hands to another one that starts from the same base.

projector.json           {"kind", "layers", "max_latent_steps", "hidden_size"}
projector.safetensors    the tensors `reasoning_projector.*`, named as in a whole checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lrscale.latent.hf_layout import PROJECTOR_PREFIX, ProjectorFields, projector_tensors
from lrscale.latent.projector import ReasoningProjector

FACTS, TENSORS = "projector.json", "projector.safetensors"


@dataclass(frozen=True, slots=True)
class ProjectorFolder:
    """A projector on disk."""

    fields: ProjectorFields
    hidden_size: int
    tensors: Path

    @classmethod
    def read(cls, folder: Path) -> ProjectorFolder:
        """What a folder holds. Raises ValueError where it is no projector."""
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            fields = ProjectorFields(facts["layers"], facts["max_latent_steps"], facts["kind"])
            found = cls(fields, facts["hidden_size"], folder / TENSORS)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} holds no Reasoning Projector ({error}); give a folder that "
                "`lrscale export RUN FOLDER --projector-only` wrote"
            ) from error
        if not found.tensors.is_file():
            raise ValueError(f"{folder} lacks {TENSORS}: copy or export the projector again")
        return found


def load_projector(projector: ReasoningProjector, folder: Path) -> None:
    """Fill a projector from a folder. Raises ValueError where the folder holds none, or one of another form."""
    found = ProjectorFolder.read(folder)
    if (found.fields.layers, found.fields.kind) != (len(projector), projector.kind):
        raise ValueError(
            f"{folder} holds a `{found.fields.kind}` projector of {found.fields.layers} blocks, needed a "
            f"`{projector.kind}` one of {len(projector)}"
        )
    try:
        projector.load_state_dict(projector_tensors([found.tensors], str(folder)))
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit this model's projector: {error}") from error


def write_projector(folder: Path, fields: ProjectorFields, hidden_size: int, tensors: Mapping[str, Tensor]) -> None:
    """Into an existing folder. `tensors` carry the names of a whole checkpoint; any but the projector's are refused."""
    foreign = [name for name in tensors if not name.startswith(PROJECTOR_PREFIX)]
    if foreign:
        raise ValueError(f"{foreign[0]} is none of the projector's tensors")
    save_file(dict(tensors), folder / TENSORS, metadata={"format": "pt"})
    facts = {**asdict(fields), "hidden_size": hidden_size}
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
