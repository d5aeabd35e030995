"""The simulation against real runs of two roles: a trainer that decodes and updates, and workers that score.

Real RL runs of the tiny policy, whose reward sleeps for log-normal seconds. Two settings calibrate: their metrics.jsonl
and rollouts give the cost of a decoding step (a + b x rows), of an update (c + d x positions), the lengths, and what a
score takes beside its sleep. Other settings, with other numbers of workers, latencies, rows, sequences and lengths, are
predicted by the simulation from these rates alone. All runs go on side by side, a step each in turn, so that whatever
else the machine does falls on them alike.

`python -m benchmarks.simulate_against_run` prints predicted and real seconds a step, and their ratio.
Imports are inside functions: every reward worker imports this file once more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrscale.stages.drain import Drain

REWARD = """
import hashlib, random, time
def reward(prompts, completions):
    digest = hashlib.sha256((prompts[0] + completions[0]).encode()).hexdigest()
    time.sleep(random.Random(digest).lognormvariate({mu!r}, {spread!r}))
    return [int(digest, 16) % 7 / 7]
"""
SPREAD = 0.5
WARM_UP = 2
"""Steps left out: workers are still starting."""


@dataclass(frozen=True)
class Setting:
    """What a run is given."""

    name: str
    prompts: int
    group: int
    batch_rows: int
    workers: int
    latency_s: float
    limit: int = 72
    """`rollout.max_new_tokens`."""

    @property
    def sequences(self) -> int:
        return self.prompts * self.group


CALIBRATION = (
    Setting("few rows", prompts=8, group=4, batch_rows=4, workers=3, latency_s=0.05),
    Setting("many rows", prompts=12, group=4, batch_rows=24, workers=3, latency_s=0.05),
)
PREDICTED = (
    Setting("scoring behind generation", prompts=16, group=4, batch_rows=16, workers=5, latency_s=0.08),
    Setting("scoring the longer", prompts=18, group=4, batch_rows=12, workers=3, latency_s=0.15),
    Setting("shorter completions", prompts=16, group=4, batch_rows=16, workers=2, latency_s=0.06, limit=40),
)


@dataclass(frozen=True)
class Step:
    """A step of a real run, as its metrics and rollouts tell."""

    rollout_s: float
    update_s: float
    other_s: float
    step_s: float
    score_s: float
    """Mean seconds of a score inside a worker."""
    lengths: tuple[tuple[int, int, int], ...]
    """Prompt tokens, completion tokens, latent steps of each sequence, in order."""


@dataclass(frozen=True)
class Rates:
    """What the calibration measured."""

    step_s: float
    """a: a decoding step whatever its rows."""
    row_s: float
    """b: a row of it."""
    update_s: float
    update_s_per_position: float
    other_s: float
    score_overhead_s: float


class Turns:
    """Several runs in threads of one process, of which one moves at a time: after a step it is the next one's turn."""

    def __init__(self, runs: int) -> None:
        self._changed = threading.Condition()
        self._order = deque(range(runs))

    def wait(self, me: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == me)

    def pass_on(self, me: int) -> None:
        with self._changed:
            self._order.rotate(-1)
            self._changed.notify_all()
        self.wait(me)

    def leave(self) -> None:
        with self._changed:
            self._order.popleft()
            self._changed.notify_all()


def train_by_turns(folders: dict[Setting, Path], steps: int) -> None:
    """Train in this process, scores in workers of each run; their lines on the terminal are left out."""
    from lrscale.stages.drain import Drain

    turns = Turns(len(folders))

    class Turn(Drain):
        """Asked at each step boundary, and never for an end: here the run waits until it is its turn again."""

        def asked(self) -> bool:
            turns.pass_on(int(threading.current_thread().name))
            print(".", end="", file=sys.__stderr__, flush=True)
            return False

    def train(number: int, folder: Path, setting: Setting) -> None:
        turns.wait(number)
        try:
            real_run(folder, setting, steps, Turn())
        finally:
            turns.leave()

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        threads = [
            threading.Thread(target=train, args=(number, folder, setting), name=str(number))
            for number, (setting, folder) in enumerate(folders.items())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def real_run(folder: Path, setting: Setting, steps: int, turn: Drain) -> None:
    """The recipe of a setting, run as `lrscale launch` does."""
    from lrscale.config.recipe import Recipe
    from lrscale.parallel.lockstep import ALONE
    from lrscale.stages.worker import run

    folder.mkdir(parents=True)
    mu = math.log(setting.latency_s) - SPREAD**2 / 2
    (folder / "reward.py").write_text(REWARD.format(spread=SPREAD, mu=mu))
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "model": {"path": "builtin:tiny", "device": "cpu"},
            "projector": {"kind": "normalised", "max_latent_steps": 8},
            "task": {"kind": "flawed_stories", "world": "ring", "events": [4, 8], "prompt_style": "brief"},
            "rollout": {"max_new_tokens": setting.limit, "batch_rows": setting.batch_rows},
            "reward": {"kind": "function", "path": str(folder / "reward.py"), "pool": {"workers": setting.workers}},
            "stages": {
                "run": ["rl"],
                "rl": {
                    "arms": ["latent"],
                    "steps": steps,
                    "prompts_per_step": setting.prompts,
                    "group_size": setting.group,
                    "learning_rate": 1e-7,
                    "refresh": {"share": 0.0},
                    "checkpoint_every": steps,
                    "audit_every": 0,
                    "save_rollouts_every": 1,
                },
            },
            "parallel": {"threads": 1},
            "report": {"html": False},
        }
    )
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    run(folder, recipe, ALONE, turn)


def steps_of(folder: Path) -> Iterator[Step]:
    """What the run's directory tells of its RL steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scoring = {line["step"]: line["scoring_s"] / line["samples"] for line in lines if line["stage"] == "reward"}
    for line in (line for line in lines if line["stage"] == "rl"):
        path = folder / "rollouts" / f"latent-step-{line['step']}.jsonl"
        rows = [json.loads(row) for row in path.read_text().splitlines()]
        known = line["rollout_s"] + line["score_s"] + line["update_s"]
        yield Step(
            line["rollout_s"],
            line["update_s"],
            line["step_s"] - known,
            line["step_s"],
            scoring[line["step"]],
            tuple((len(row["prompt_ids"]), row["tokens"], row["latent_steps"]) for row in rows),
        )


def decoded(setting: Setting, step: Step) -> tuple[int, int]:
    """Decoding steps of a step's batches, and rows in them added up; a prompt is a row for each of its tokens."""
    steps = rows = 0
    count = -(-setting.sequences // setting.batch_rows)
    for number in range(count):
        batch = range(setting.sequences * number // count, setting.sequences * (number + 1) // count)
        positions = [sum(step.lengths[index][1:]) for index in batch]
        steps += max(positions)
        rows += sum(positions) + sum({index // setting.group: step.lengths[index][0] for index in batch}.values())
    return steps, rows


def measured(runs: Sequence[tuple[Setting, list[Step]]]) -> Rates:
    """Two lines through the medians of the two settings."""

    def line(points: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
        """x and y of u x + v y = w, for two points (u, v, w)."""
        (u, v, w), (p, q, r) = points
        determinant = u * q - v * p
        return (w * q - v * r) / determinant, (u * r - w * p) / determinant

    generation, update = [], []
    for setting, steps in runs:
        counts = [decoded(setting, step) for step in steps]
        generation.append(
            (_mean(c[0] for c in counts), _mean(c[1] for c in counts), _middle(s.rollout_s for s in steps))
        )
        update.append((1.0, _mean(sum(map(sum, s.lengths)) for s in steps), _middle(s.update_s for s in steps)))
    (step_s, row_s), (update_s, position_s) = line(generation), line(update)
    everything = [(setting, step) for setting, steps in runs for step in steps]
    return Rates(
        step_s,
        max(row_s, 1e-6),  # what else the machine does may hide what a row costs
        update_s,
        max(position_s, 0.0),
        _middle(step.other_s for _, step in everything),
        _middle(step.score_s - setting.latency_s for setting, step in everything),
    )


def predicted_s(setting: Setting, rates: Rates, lengths: Sequence[tuple[int, int, int]]) -> float:
    """Seconds a step by simulation, with the lengths that the calibration saw, cut at the setting's limit."""
    from lrscale.plan.simulation.lengths import Completion, MeasuredLengths
    from lrscale.plan.simulation.run import simulate_run
    from lrscale.plan.simulation.scenario import Costs, LognormalLatency, Scenario, Scoring

    seen = []
    for _, tokens, latents in lengths:
        kept = min(1.0, setting.limit / (tokens + latents))
        seen.append(Completion(round(tokens * kept), round(latents * kept)))
    costs = Costs(
        prefill_tokens_per_s=1.0 / rates.row_s,
        decode_s=lambda rows, context: rates.step_s + rates.row_s * rows,
        max_rows=setting.sequences // -(-setting.sequences // setting.batch_rows),
        update_s=max(0.0, rates.update_s + rates.other_s),
        update_s_per_token=rates.update_s_per_position,
    )
    scenario = Scenario(
        steps=60,
        prompts_per_step=setting.prompts,
        group_size=setting.group,
        prompt_tokens=round(_mean(prompt for prompt, _, _ in lengths)),
        lengths=MeasuredLengths(tuple(seen)),
        costs=costs,
        scoring=Scoring(setting.workers, LognormalLatency(setting.latency_s + rates.score_overhead_s, SPREAD)),
        engines=1,
        train_nodes=1,
        continuous=False,
    )
    return simulate_run(scenario, seed=0).step_s


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _middle(values: Iterable[float]) -> float:
    return statistics.median(values)


def compared(runs: dict[Setting, list[Step]]) -> Iterator[tuple[str, float, float, float]]:
    """(setting, predicted, real, real if the two roles took turns) of the settings that calibrate nothing."""
    rates = measured([(setting, runs[setting]) for setting in CALIBRATION])
    print(
        f"  decoding step {1e3 * rates.step_s:.2f} ms + {1e3 * rates.row_s:.3f} ms a row, update {rates.update_s:.2f} s + "
        f"{1e3 * rates.update_s_per_position:.3f} ms a position, score + {1e3 * rates.score_overhead_s:.1f} ms"
    )
    lengths = [length for setting in CALIBRATION for step in runs[setting] for length in step.lengths]
    for setting in PREDICTED:
        steps = runs[setting]
        apart = _middle(step.rollout_s + step.update_s + step.other_s for step in steps)
        apart += setting.sequences * _middle(step.score_s for step in steps) / setting.workers
        yield setting.name, predicted_s(setting, rates, lengths), _middle(step.step_s for step in steps), apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="Each calibrates and predicts by itself.")
    parser.add_argument("--steps", type=int, default=5, help="RL steps a round.")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    settings = (*CALIBRATION, *PREDICTED)
    with tempfile.TemporaryDirectory() as folder:
        folders = {setting: Path(folder) / setting.name for setting in settings}
        started = time.monotonic()
        train_by_turns(folders, WARM_UP + options.rounds * options.steps)
        done = {setting: list(steps_of(path))[WARM_UP:] for setting, path in folders.items()}
    print(
        f"{options.rounds} rounds of {options.steps} steps of {len(settings)} runs, {time.monotonic() - started:.0f} s"
    )
    found: dict[str, list[tuple[float, ...]]] = {}
    for number in range(options.rounds):
        part = slice(number * options.steps, (number + 1) * options.steps)
        for name, *values in compared({setting: steps[part] for setting, steps in done.items()}):
            found.setdefault(name, []).append(tuple(values))
    print(
        f"  {'setting':<28} {'predicted, s':>13} {'real, s':>9} {'roles by turns, s':>18} {'predicted / real':>17}   least to most"
    )
    for name, values in found.items():
        ratios = sorted(foreseen / real for foreseen, real, _ in values)
        foreseen, real, apart = (_middle(column) for column in zip(*values, strict=True))
        print(
            f"  {name:<28} {foreseen:>13.2f} {real:>9.2f} {apart:>18.2f} {_middle(ratios):>17.3f}   "
            f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        )


if __name__ == "__main__":
    main()
