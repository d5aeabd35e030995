"""Which row, and which module, made an update not finite?

    python -m lrscale.stages replay-step RUN [--step NAME]

Runs the rows of a failed update one by one, in one process, with the weights that the update began with, and
looks for the first module whose output is not finite. One JSON object a row on stdout, a table on stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrscale.config.load import read_recipe
from lrscale.config.recipe import Recipe
from lrscale.latent import LatentPolicy
from lrscale.objective import PolicyObjective, after_first_marker_mask, policy_loss, projector_loss
from lrscale.parallel.engine import GROUPS
from lrscale.parallel.loading import load_policy
from lrscale.parallel.ranks import Ranks
from lrscale.parallel.single import SingleEngine
from lrscale.parallel.turns import training_turn
from lrscale.report.table import Cells, plain_table
from lrscale.stages.batching import padded
from lrscale.stages.failed_step import FOLDER, FailedStep, load_failed_step
from lrscale.stages.lite_rows import LiteRow
from lrscale.stages.sampling import ARMS
from lrscale.stages.update import Row, UpdateSettings, pack, replay_logprobs


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 3 something does not fit, 7 no failed step there, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m lrscale.stages replay-step", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--step", help="a folder in RUN/failed; the newest by default")
    options = parser.parse_args(arguments)
    try:
        folder = find_failed(options.run, options.step)
        if folder is None:
            print(f"error: {options.run / FOLDER} holds no failed step to replay", file=sys.stderr)
            return 7
        results = replay(read_recipe(options.run / "recipe.json"), load_failed_step(folder))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {str(error).removeprefix('error: ')}", file=sys.stderr)
        return 3
    for result in results:
        print(json.dumps(result))
    print(plain_table(cells(results)), file=sys.stderr)
    print(verdict(results), file=sys.stderr)
    return 0


def find_failed(run_dir: Path, name: str | None) -> Path | None:
    """The folder of that name, or the one written last."""
    folders = [path.parent for path in (run_dir / FOLDER).glob("*/batch.json") if name in (None, path.parent.name)]
    return max(folders, key=lambda path: (path / "batch.json").stat().st_mtime, default=None)


def replay(recipe: Recipe, failed: FailedStep) -> list[dict[str, Any]]:
    """Each row's figures, in the order of the update."""
    policy = load_policy(recipe.model, recipe.projector)
    engine = SingleEngine(policy, recipe.optimisation, ranks=Ranks())
    engine.load(failed.weights)
    for group in GROUPS:
        engine.reset_optimizer(group)  # it takes the gradients of narrow weights away as they come
    trained = policy.model if failed.stage == "rl" else policy.projector
    results = []
    for row in failed.rows:
        with training_turn(policy, trained), watched(policy) as culprits:
            loss, facts = _rl_loss(policy, recipe, failed, row) if isinstance(row, Row) else _sft_loss(policy, row)
            if loss.requires_grad:
                loss.backward()
            squares = [p.grad.double().square().sum() for p in policy.parameters() if p.grad is not None]
            norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
            policy.zero_grad(set_to_none=True)
        facts |= {"loss": float(loss.detach()), "grad_norm": norm}
        facts["finite"] = all(math.isfinite(value) for value in facts.values() if isinstance(value, float))
        facts["first_module"] = culprits[0] if culprits else None
        results.append({key: _plain(value) for key, value in facts.items()})
    return results


@contextmanager
def watched(policy: LatentPolicy) -> Iterator[list[str]]:
    """Collects the names of modules whose output is not finite, in the order in which they ran."""
    culprits: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                reads = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
                fed = all(bool(torch.isfinite(value).all()) for value in reads)
                culprits.append(f"{name} (its input is {'finite' if fed else 'not finite either'})")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in policy.named_modules() if not any(m.children())]
    try:
        yield culprits
    finally:
        for handle in handles:
            handle.remove()


def verdict(results: list[dict[str, Any]]) -> str:
    """One sentence."""
    bad = [result for result in results if not result["finite"]]
    if not bad:
        return (
            f"all {len(results)} rows are finite one by one: the update overflowed where they add up, or on other "
            "hardware; lower the learning rate or max_grad_norm"
        )
    where = (
        f"; the first module whose output is not finite is {bad[0]['first_module']}" if bad[0]["first_module"] else ""
    )
    return f"{len(bad)} of {len(results)} rows are not finite, first {bad[0]['row']}{where}"


def cells(results: list[dict[str, Any]]) -> Cells:
    header = (
        "row",
        "positions",
        "latents",
        "advantage",
        "loss",
        "log-prob min",
        "latent norm max",
        "grad norm",
        "finite",
    )
    rows = tuple(
        (
            result["row"],
            str(result["positions"]),
            str(result["latents"]),
            _number(result.get("advantage")),
            _number(result["loss"]),
            _number(result["logprob_min"]),
            _number(result["latent_norm_max"]),
            _number(result["grad_norm"]),
            "yes" if result["finite"] else "NO",
        )
        for result in results
    )
    return Cells(header, rows, text_columns=1)


def _rl_loss(policy: LatentPolicy, recipe: Recipe, failed: FailedStep, row: Row) -> tuple[Tensor, dict[str, Any]]:
    settings = UpdateSettings(
        rl=recipe.stages.rl,
        mode=ARMS[failed.arm].mode if failed.arm else "real",
        temperature=recipe.rollout.temperature,
        max_new_tokens=recipe.rollout.max_new_tokens,
        micro_batch_tokens=recipe.optimisation.micro_batch_tokens,
        seed=recipe.seed,
    )
    batch = pack([row], policy.device)
    logprobs_BT = replay_logprobs(policy, batch, settings)
    plain = PolicyObjective(clip_low=recipe.stages.rl.clip_low, clip_high=recipe.stages.rl.clip_high)
    loss = policy_loss(logprobs_BT, batch, plain, normaliser=max(1, len(row.rollout.completion_ids))).loss
    facts = _facts(row.name, row.positions, row.rollout.latents_LH, logprobs_BT)
    return loss, {**facts, "advantage": row.advantage}


def _sft_loss(policy: LatentPolicy, row: LiteRow) -> tuple[Tensor, dict[str, Any]]:
    ids_BT, mask_BT = padded([row.ids], policy.device)
    counted_BT = after_first_marker_mask([row.spans], mask_BT)
    out = policy.expand(ids_BT, mask_BT)
    logprobs_BT = policy.token_logprobs(out.hidden_BTH, ids_BT, where_BT=counted_BT)
    loss = projector_loss(logprobs_BT, counted_BT, max(1, int(counted_BT.sum())))
    return loss, _facts(row.prompt_id, row.positions, out.latents[0].detach(), logprobs_BT)


def _facts(name: str, positions: int, latents_LH: Tensor, logprobs_BT: Tensor) -> dict[str, Any]:
    norms_L = latents_LH.detach().float().norm(dim=-1)
    return {
        "row": name,
        "positions": positions,
        "latents": len(latents_LH),
        "logprob_min": float(logprobs_BT.detach().min()),
        "latent_norm_max": float(norms_L.max()) if len(norms_L) else 0.0,
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN: such numbers become words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
