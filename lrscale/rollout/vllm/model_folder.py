"""From a folder that LatentPolicy.save_pretrained wrote to one that vLLM loads.

Weights and tokenizer are the same files, linked; the config differs:

    architectures     our model class
    vocab_size        one more: vLLM's stream of tokens has one id beyond the vocabulary
    latent_token_id   that id, which stands for every latent position

The id lies outside of the trainer's vocabulary, though large models have unused rows inside: those take part
in the trainer's softmax, so to mask one would move the log-probs of all other tokens.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lrscale.rollout.vllm.architectures import ARCHITECTURES

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class VllmModelFolder:
    """A model folder for vLLM."""

    path: Path
    latent_token_id: int

    @classmethod
    def read(cls, path: Path) -> VllmModelFolder:
        """Raises ValueError where `prepare` did not make the folder."""
        fields = _config(path)
        if "latent_token_id" not in fields:
            raise ValueError(f"{path} was not made for vLLM by lrscale")
        return cls(path, fields["latent_token_id"])


def prepare(source_folder: Path, target_folder: Path) -> VllmModelFolder:
    """Make `target_folder`, or make it anew; files are hard links where the file system allows, else symbolic ones.

    Raises:
        ValueError: the source is no LiteReason checkpoint of a model that vLLM serves with latent steps, or the
            target holds something else.
    """
    source, target = Path(source_folder), Path(target_folder)
    fields = _config(source)
    if not fields.get("is_litereason_model"):
        raise ValueError(f"{source} holds no Reasoning Projector: save the policy with LatentPolicy.save_pretrained")
    (architecture,) = fields.get("architectures") or [None]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{source} holds a {architecture}; with latent steps vLLM serves {', '.join(sorted(ARCHITECTURES))}. Roll "
            "out with the local engine (rollout.kind: local)"
        )
    if target.exists():
        VllmModelFolder.read(target)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name != _CONFIG:
            _link(file.resolve(), partial / file.name)
    latent_token_id = fields["vocab_size"]
    served = fields | {
        "architectures": [ARCHITECTURES[architecture]],
        "vocab_size": latent_token_id + 1,
        "latent_token_id": latent_token_id,
    }
    (partial / _CONFIG).write_text(json.dumps(served, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return VllmModelFolder(target, latent_token_id)


def _config(folder: Path) -> dict[str, object]:
    try:
        return json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} holds no {_CONFIG}: {error}") from error


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        target.symlink_to(source)
