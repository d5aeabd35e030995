"""Ranks with different work, in lockstep or without.

uneven FOLDER markers|decode|batches on|off
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lrscale.latent.pace import ALONE
from lrscale.stages.batching import padded
from tests.distributed.programs.job import build, report, start, uneven_rows


def main() -> None:
    folder, case, lockstep_is = sys.argv[1:4]
    lockstep = start(timeout_s=20)
    plain = build("single", Path(folder), lockstep).policy
    engine = build("zero3", Path(folder), lockstep)
    policy, rank = engine.policy, lockstep.ranks.rank
    if lockstep_is == "off":
        policy.pace = ALONE
    rows = uneven_rows(policy)
    if case == "markers":  # one rank with many markers, the other with none
        ids_BT, mask_BT = padded([rows[3]] if rank == 0 else [rows[2]], torch.device("cpu"))
        ours, theirs = (p.expand(ids_BT, mask_BT).logits_BTV for p in (policy, plain))
        same = bool(torch.allclose(ours, theirs, atol=1e-4))
    else:
        # decode: one rank stops at its first token; batches: one rank has three batches, the other no row at all.
        options = {"max_new_tokens": 12, "batch_rows": 2, "seed": 3}
        options["stop_ids"] = list(range(256)) if case == "decode" and rank == 1 else []
        prompts = [] if case == "batches" and rank == 1 else [row[:20] for row in rows[:5]]
        ours, theirs = (p.generate(prompts, **options) for p in (policy, plain))
        same = [r.completion_ids for r in ours] == [r.completion_ids for r in theirs]
    report(lockstep, same=same)


if __name__ == "__main__":
    with torch.no_grad():
        main()
