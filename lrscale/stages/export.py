"""A run's policy, or its projector alone, out of its checkpoints: tensor by tensor, on one CPU, never a whole model.

    python -m lrscale.stages export RUN OUT [--arm ARM] [--projector-only] [--max-shard-bytes N]

The checkpoints of any engine on any number of ranks are read. The folder comes to be whole or not at all.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrscale.config.load import read_recipe
from lrscale.config.recipe import Recipe
from lrscale.latent import LatentPolicy
from lrscale.latent.hf_layout import PROJECTOR_PREFIX, weight_files
from lrscale.latent.projector_folder import write_projector
from lrscale.parallel.checkpoint import CheckpointStore
from lrscale.parallel.engine_state import piece_files
from lrscale.parallel.export import MAX_SHARD_BYTES, ShardWriter, put_in_place
from lrscale.parallel.loading import checked_source
from lrscale.parallel.shards import Tensors, WholeFiles
from lrscale.parallel.skeleton import skeleton
from lrscale.parallel.turns import state_buffers
from lrscale.stages import projector_sft
from lrscale.stages.run_log import Display
from lrscale.stages.sampling import ARMS

_WEIGHTS = "weights/"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights of a stage's newest policy lie."""

    stage: str
    where: Path
    tensors: Tensors
    prefix: str
    """Of the weights' names among the tensors."""

    def names(self) -> list[str]:
        return [name.removeprefix(self.prefix) for name in self.tensors.names() if name.startswith(self.prefix)]

    def read(self, name: str) -> Tensor:
        shape = torch.Size(self.tensors.shape(self.prefix + name))
        return self.tensors.read(self.prefix + name, 0, shape.numel()).reshape(shape)


def find_source(run_dir: Path, arm: str | None) -> Source:
    """The newest whole checkpoint of an arm (or of `projector_sft`), else the model that the finished arm left.

    Without an arm: the first of `latent`, the other arms, `projector_sft` that has something.

    Raises:
        ValueError: there is nothing to export yet.
    """
    stages = [*ARMS, projector_sft.STAGE]
    for stage in stages if arm is None else [arm]:
        folder = run_dir / "checkpoints" / stage
        checkpoint = CheckpointStore(folder).latest(mend=False) if folder.is_dir() else None
        if checkpoint is not None:
            return Source(stage, checkpoint.folder, piece_files(checkpoint.folder), _WEIGHTS)
        model = run_dir / "models" / stage
        if (model / "config.json").is_file():
            return Source(stage, model, WholeFiles(weight_files(str(model))), "")
    there = [stage for stage in stages if any((run_dir / "checkpoints" / stage).glob("step-*"))]
    what = "nothing" if arm is None else f"no {arm}"
    raise ValueError(
        f"{run_dir} holds {what} to export: a policy is there once projector_sft has a checkpoint"
        + (f"; there is one of {', '.join(there)}" if there else "")
    )


def export(recipe: Recipe, source: Source, out: Path, *, projector_only: bool, max_shard_bytes: int) -> None:
    """Write the folder `out`.

    Raises:
        ValueError: `out` exists, or the weights are not those of the recipe's model.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; nothing is overwritten")
    base, tokenizer, _ = checked_source(recipe.model, recipe.projector)
    policy = skeleton(base, tokenizer, recipe.model, recipe.projector)
    names = _checked_names(policy, source)
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if projector_only:
            tensors = {name: source.read(name) for name in names if name.startswith(PROJECTOR_PREFIX)}
            write_projector(temporary, policy.projector_fields, policy.backbone.hidden_size, tensors)
        else:
            policy.save_config(temporary)
            _copy(source, names, ShardWriter(temporary, max_shard_bytes))
        put_in_place(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _copy(source: Source, names: list[str], writer: ShardWriter) -> None:
    with Display().progress("export", len(names)) as progress:
        for name in names:
            writer.add(name, source.read(name))
            progress.advance()
    writer.finish()


def _checked_names(policy: LatentPolicy, source: Source) -> list[str]:
    """Names of all weights in the model's order; they must be those that were saved, in the same shapes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in policy.model.named_parameters()}
    shapes |= {PROJECTOR_PREFIX + name: tuple(p.shape) for name, p in policy.projector.named_parameters()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in state_buffers(policy)}
    saved = {name: tuple(source.tensors.shape(source.prefix + name)) for name in source.names()}
    differing = sorted(name for name in {*shapes, *saved} if shapes.get(name) != saved.get(name))
    if differing:
        raise ValueError(
            f"{source.where} does not hold the weights of this run's model ({len(differing)} tensors differ, "
            f"{differing[0]} first): has the folder behind model.path changed?"
        )
    return list(shapes)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 3 there is nothing to export or it does not fit, 6 the disk refused."""
    parser = argparse.ArgumentParser(
        prog="python -m lrscale.stages.export", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arm")
    parser.add_argument("--projector-only", action="store_true")
    parser.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES)
    options = parser.parse_args(arguments)
    try:
        print("looking for the newest whole checkpoint", file=sys.stderr)
        source = find_source(options.run, options.arm)
        print(f"exporting {source.stage} from {source.where}", file=sys.stderr)
        recipe = read_recipe(options.run / "recipe.json")
        export(
            recipe, source, options.out, projector_only=options.projector_only, max_shard_bytes=options.max_shard_bytes
        )
    except (ValueError, OSError) as error:
        print(f"error: {str(error).removeprefix('error: ')}", file=sys.stderr)
        return 3 if isinstance(error, ValueError) else 6
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
