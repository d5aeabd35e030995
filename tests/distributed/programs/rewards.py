"""Ranks that score what they sampled: one rank's reward hangs far longer than the watchdog's limit.

rewards FOLDER        FOLDER/reward.py holds the reward
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from lrscale.config.reward import FunctionRewardConfig, PoolConfig
from lrscale.config.rollout import LocalRolloutConfig
from lrscale.records import Prompt, Score
from lrscale.report.timing import PhaseTimer
from lrscale.reward.build import Surroundings, build_scorer
from lrscale.rollout.engine import SamplingPlan
from lrscale.rollout.local import LocalRollouts
from lrscale.stages.pending import PendingRollouts
from lrscale.stages.prompts import PromptBook
from lrscale.stages.run_log import Display
from lrscale.stages.sampling import Sampler
from tests.distributed.programs.job import report, start
from tests.unit.latent.tiny_models import live_policy
from tests.unit.stages.test_sampling import Letters

LIMIT_S = 6.0
TIMEOUT_S = 13.0


def main() -> None:
    folder = Path(sys.argv[1])
    lockstep = start(timeout_s=240)
    rank = lockstep.ranks.rank
    policy = live_policy()
    config = FunctionRewardConfig(
        kind="function", path="reward.py", timeout_s=TIMEOUT_S, max_failed_share=0.5, pool=PoolConfig(workers=2)
    )
    surroundings = Surroundings(folder, world_size=lockstep.ranks.world_size, log=str(folder / f"log-{rank}"))
    prompts = [Prompt(name, name * 3) for name in "abcd"]
    with closing(build_scorer(config, None, surroundings)) as scorer:
        sampler = Sampler(
            LocalRollouts(policy, LocalRolloutConfig(max_new_tokens=6)),
            scorer,
            PromptBook(Letters(), policy, chat_template=False),
            policy,
            Display(show=False),
            lockstep,
            PendingRollouts(folder / "pending", rank),
        )
        lockstep.barrier()
        lockstep.watch(limit_s=LIMIT_S, on_stall=lambda message: report(lockstep, stalled=message))
        groups = sampler.groups(prompts, 2, SamplingPlan(seed=3), PhaseTimer())
        assert lockstep.watchdog is not None
        lockstep.watchdog.stop()
        scores = [score.value if isinstance(score, Score) else score.kind for group in groups for score in group.scores]
        report(lockstep, scores=scores, metrics=sampler.scoring_metrics())
    lockstep.barrier()


if __name__ == "__main__":
    main()
