"""Ranks that wait for one that does not come, or that are slow but move.

stall early|busy|killed|slow|working
"""

from __future__ import annotations

import os
import signal
import sys
import time

from tests.distributed.programs.job import report, start

LIMIT_S = 4.0


def main() -> None:
    case = sys.argv[1]
    lockstep = start(timeout_s=120)
    rank = lockstep.ranks.rank

    def tell(message: str) -> None:
        report(lockstep, message=message)

    last = lockstep.ranks.world_size - 1
    # The one that is waited for ends later: it would name itself, and the message of the others might be lost.
    lockstep.watch(limit_s=LIMIT_S if rank != last else 1.5 * LIMIT_S, on_stall=tell)
    with lockstep.phase("update", step=12):
        lockstep.barrier()
        if case == "slow" or (case == "working" and rank == last):  # for twice the limit; `working`: the others wait
            for _ in range(8):
                time.sleep(LIMIT_S / 4)
                lockstep.tick()
        elif rank == last:
            if case == "killed":
                time.sleep(2 * LIMIT_S / 8)
                os.kill(os.getpid(), signal.SIGSTOP)  # as a frozen node: alive to the system, silent to its peers
            if case == "busy":
                with lockstep.phase("score", step=12):
                    time.sleep(60)
            if case == "early":
                time.sleep(60)
        lockstep.barrier()
    assert lockstep.watchdog is not None
    lockstep.watchdog.stop()
    report(lockstep, message="done")


if __name__ == "__main__":
    main()
