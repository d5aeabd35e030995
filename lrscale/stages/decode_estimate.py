"""How long decoding on sharded weights will take, measured and said before it starts: nobody should wait to find out."""

from __future__ import annotations

import time

from lrscale.parallel.replica import whole_bytes
from lrscale.report.timing import duration
from lrscale.rollout.local import LocalRollouts
from lrscale.stages.parts import Parts
from lrscale.stages.sampling import share

POSITIONS = 4
"""Decoded for the measurement, after one that is not counted."""


def say_decoding_time(parts: Parts) -> None:
    """Time a few positions as RL will decode them, and say what a step of it can take. Collective."""
    recipe, rollouts = parts.recipe, parts.rollouts
    if recipe.parallel.kind == "single" or not isinstance(rollouts, LocalRollouts):
        return
    started = time.perf_counter()
    rollouts.load_weights(parts.engine.full_parameters(), version=0)
    publish_s = time.perf_counter() - started
    ranks = parts.engine.ranks
    samples = len(share(recipe.stages.rl.prompts_per_step * recipe.stages.rl.group_size, ranks))
    rows = min(samples, recipe.rollout.batch_rows) or 1
    seconds = max(parts.engine.lockstep.gather_json(seconds_a_position(parts, rollouts, rows)))
    longest = seconds * recipe.rollout.max_new_tokens * -(-samples // rows)
    size_gib = whole_bytes(parts.policy) / 2**30
    if rollouts.copies:
        how = f"each rank on a whole copy of the weights ({size_gib:.2g} GiB, filled in {publish_s:.2g} s)"
        other = ""
    else:
        how = "all ranks together on their shards (parallel.gather per_layer)"
        other = f"; whole copies would take {size_gib:.2g} GiB a rank (parallel.whole_gather_gib)"
    parts.log.say(
        f"decoding: {how}: {seconds:.2g} s a position of {rows} rows a rank, at most {duration(longest)} a step of RL"
        f" ({recipe.rollout.max_new_tokens} positions){other}"
    )


def seconds_a_position(parts: Parts, rollouts: LocalRollouts, rows: int) -> float:
    """Wall seconds for one more token of `rows` sequences, behind the first training prompt."""
    prompt_ids = parts.book.ids(parts.book.prompts("train", markers=False)[0])

    def decode(positions: int) -> float:
        started = time.perf_counter()
        rollouts.policy.generate(
            [prompt_ids] * rows, max_new_tokens=positions, min_new_tokens=positions, batch_rows=rows, mode="zero"
        )
        return time.perf_counter() - started

    decode(1)  # what is set up once
    return max((decode(1 + POSITIONS) - decode(1)) / POSITIONS, 0.0)
