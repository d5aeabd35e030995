"""Ranks with different work, in lockstep or without.

uneven FOLDER CASE[,CASE...] on|off      cases: markers backward single_steps heads decode batches
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lrscale.latent import LatentPolicy
from lrscale.latent.pace import ALONE
from lrscale.parallel.engine import Engine
from lrscale.stages.batching import padded
from tests.distributed.programs.equality import whole_gradient, worst_difference
from tests.distributed.programs.job import build, report, start, uneven_rows

CPU = torch.device("cpu")


def main() -> None:
    folder, cases, lockstep_is = sys.argv[1:4]
    lockstep = start(timeout_s=20 if lockstep_is == "off" else 120)  # without it, ranks wait that long
    plain = build("single", Path(folder), lockstep)
    engine = build("zero3", Path(folder), lockstep)
    if lockstep_is == "off":
        engine.policy.pace = ALONE
    rows, rank = uneven_rows(plain.policy), lockstep.ranks.rank
    report(lockstep, same={case: CASES[case](engine, plain, rows, rank) for case in cases.split(",")})


@torch.no_grad()
def markers(engine: Engine, plain: Engine, rows: list[list[int]], rank: int) -> bool:
    """One rank with many markers, the other with none."""
    ids_BT, mask_BT = padded([rows[3]] if rank == 0 else [rows[2]], CPU)
    ours, theirs = (policy.expand(ids_BT, mask_BT).logits_BTV for policy in (engine.policy, plain.policy))
    return bool(torch.allclose(ours, theirs, atol=1e-4))


def backward(engine: Engine, plain: Engine, rows: list[list[int]], rank: int) -> bool:
    """The same with gradients: the backward graphs have to match, not only the forwards."""
    return same_gradients(engine, plain, [rows[3], rows[2]], rank)


def single_steps(engine: Engine, plain: Engine, rows: list[list[int]], rank: int) -> bool:
    """Runs of one latent each, which go in with the text behind them: a rank without any must hang on them too."""
    marker = plain.policy.marker_ids(1)
    with_markers = [*rows[2][:5], *marker, *rows[2][5:10], *marker, *rows[2][10:]]
    return same_gradients(engine, plain, [with_markers, rows[2]], rank)


def same_gradients(engine: Engine, plain: Engine, of_ranks: list[list[int]], rank: int) -> bool:
    """A row a rank under ZeRO-3, against all rows in one process."""
    gradients = []
    for one, chosen in ((engine, [of_ranks[rank]]), (plain, of_ranks)):
        with one.training("projector"):
            one.backward(-logprobs(one.policy, chosen).sum() / 100)
            named = one.policy.projector.named_parameters()
            gradients.append({name: whole_gradient(parameter) for name, parameter in named})
    return worst_difference(gradients[1], gradients[0]) < 1e-4


@torch.no_grad()
def heads(engine: Engine, plain: Engine, rows: list[list[int]], rank: int) -> bool:
    """The LM head runs in chunks: two on one rank, one on the other."""
    chosen = [rows[3]] * 12 if rank == 0 else [rows[2]]
    for policy in (engine.policy, plain.policy):
        policy.logits_mib = 1  # 512 tokens of this vocabulary
    ours, theirs = (logprobs(policy, chosen) for policy in (engine.policy, plain.policy))
    return bool(torch.allclose(ours, theirs, atol=1e-4))


@torch.no_grad()
def decode(engine: Engine, plain: Engine, rows: list[list[int]], rank: int) -> bool:
    """One rank stops at its first token."""
    return decoded_alike(engine, plain, rows, stop_ids=list(range(256)) if rank == 1 else [])


@torch.no_grad()
def batches(engine: Engine, plain: Engine, rows: list[list[int]], rank: int) -> bool:
    """One rank has three batches, the other no row at all."""
    return decoded_alike(engine, plain, [] if rank == 1 else rows, stop_ids=[])


CASES = {
    "markers": markers,
    "backward": backward,
    "single_steps": single_steps,
    "heads": heads,
    "decode": decode,
    "batches": batches,
}


def logprobs(policy: LatentPolicy, rows: list[list[int]]) -> torch.Tensor:
    ids_BT, mask_BT = padded(rows, CPU)
    out = policy.expand(ids_BT, mask_BT)
    return policy.token_logprobs(out.hidden_BTH, ids_BT, where_BT=mask_BT)


def decoded_alike(engine: Engine, plain: Engine, rows: list[list[int]], stop_ids: list[int]) -> bool:
    prompts = [row[:20] for row in rows[:5]]
    ours, theirs = (
        policy.generate(prompts, max_new_tokens=12, batch_rows=2, seed=3, stop_ids=stop_ids)
        for policy in (engine.policy, plain.policy)
    )
    return [r.completion_ids for r in ours] == [r.completion_ids for r in theirs]


if __name__ == "__main__":
    main()
