"""How much of scoring hides behind generation: real decoding of the tiny policy, a reward that sleeps.

G: generation alone. R: scoring alone, all samples at once through the same pool. Pipeline: samples scored as they
finish. Rows that finish last have nothing to hide behind, so the rows are many against those decoded side by side, as
they are in RL. The sleep is set so that R is a given share of G. CPU: what the pool adds to the trainer's own CPU seconds, which
tells on a busy machine as well. `python -m benchmarks.reward_overlap` prints the table.

Imports are inside functions: every reward worker imports this file once more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REWARD = """
import time
def reward(completions, seconds):
    time.sleep(seconds[0])
    return [float(len(completions[0]) % 2)]
"""
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)


class Bench:
    """The tiny policy, prompts of its own task, and a pool whose reward sleeps."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        from lrscale.config.model import ModelConfig
        from lrscale.config.reward import FunctionRewardConfig, PoolConfig
        from lrscale.config.rollout import LocalRolloutConfig
        from lrscale.config.task import FlawedStoriesConfig
        from lrscale.parallel.loading import checkpoint_projector, load_policy
        from lrscale.reward.build import Surroundings, build_scorer
        from lrscale.rollout.local import LocalRollouts
        from lrscale.tasks.flawed_stories import FlawedStories

        model = ModelConfig(path="builtin:tiny")
        self.policy = load_policy(model, checkpoint_projector(model))
        self.rollouts = LocalRollouts(
            self.policy, LocalRolloutConfig(max_new_tokens=options.positions, batch_rows=options.batch_rows)
        )
        stories = FlawedStoriesConfig(world="ring", events=(4, 8), prompt_style="brief")
        task = FlawedStories(stories, seed=0)
        self.prompts = [task.prompt("train", index, markers=False) for index in range(options.rows)]
        self.ids = [self.policy.encode(prompt.text) for prompt in self.prompts]
        self.workers = options.workers
        (folder / "reward.py").write_text(REWARD)
        config = FunctionRewardConfig(kind="function", path="reward.py", pool=PoolConfig(workers=options.workers))
        self.scorer = build_scorer(config, None, Surroundings(folder))

    def generate(self) -> list[tuple[int, Any]]:
        from lrscale.rollout.engine import SamplingPlan

        return list(self.rollouts.generate(self.ids, SamplingPlan(seed=0)))

    def score(self, found: list[tuple[int, Any]], sleep_s: float) -> None:
        self.scorer.begin([index for index, _ in found])
        for index, rollout in found:
            self._submit(index, rollout, sleep_s)
        self._drain(len(found))

    def pipeline(self, sleep_s: float) -> None:
        from lrscale.rollout.engine import SamplingPlan

        self.scorer.begin(range(len(self.ids)))
        for index, rollout in self.rollouts.generate(self.ids, SamplingPlan(seed=0)):
            self._submit(index, rollout, sleep_s)
        self._drain(len(self.ids))

    def _submit(self, index: int, rollout: Any, sleep_s: float) -> None:
        from dataclasses import replace

        from lrscale.stages.rollout_io import tokens_text

        prompt = replace(self.prompts[index], columns={"seconds": sleep_s})
        self.scorer.submit(index, prompt, rollout, tokens_text(self.policy, rollout.completion_ids))

    def _drain(self, count: int) -> None:
        while not self.scorer.wait(1.0):
            pass
        assert len(self.scorer.drain()) == count


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("rows", 192), ("batch-rows", 8), ("positions", 32), ("workers", 4), ("runs", 3), ("threads", 1))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        try:
            table(bench, options)
        finally:
            bench.scorer.close()


def table(bench: Bench, options: argparse.Namespace) -> None:
    """G, R and pipeline in turns, run by run, the best of each: whatever else the machine does only adds to them."""
    found = bench.generate()
    rough = min(seconds(bench.generate) for _ in range(3))
    lengths = [rollout.length for _, rollout in found]
    print(
        f"{options.rows} rows, {options.batch_rows} side by side, {statistics.mean(lengths):.0f} positions on average, "
        f"{options.workers} workers, {options.threads} thread(s); best of {options.runs} runs"
    )
    print("  R/G wanted      G, s      R, s   G+R, s   pipeline, s   pipeline / max(G, R)   hidden, %   CPU, % more")
    for share in SHARES:
        sleep_s = share * rough * options.workers / options.rows
        runs = []
        for _ in range(options.runs):
            cpu = time.process_time()
            alone = seconds(bench.generate)
            cpu_alone = time.process_time() - cpu
            scoring = seconds(lambda sleep_s=sleep_s: bench.score(found, sleep_s))
            cpu = time.process_time()
            both = seconds(lambda sleep_s=sleep_s: bench.pipeline(sleep_s))
            runs.append((alone, scoring, both, (time.process_time() - cpu) / cpu_alone - 1.0))
        generation, scoring, both = (min(values) for values in list(zip(*runs, strict=True))[:3])
        more = statistics.median(run[3] for run in runs)
        ratio = both / max(generation, scoring)
        hidden = (generation + scoring - both) / min(generation, scoring)
        print(
            f"  {share:10.1f} {generation:9.2f} {scoring:9.2f} {generation + scoring:8.2f} {both:13.2f} {ratio:22.2f} "
            f"{100 * hidden:11.0f} {100 * more:14.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
