"""Two ranks that call the same or different modules of equal size.

order same|different
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from lrscale.parallel.order import OrderCheck, OrderError
from tests.distributed.programs.job import report, start


def main() -> None:
    lockstep = start()
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    check = OrderCheck(model)
    order = [0, 1] if sys.argv[1] == "same" or lockstep.ranks.rank == 0 else [1, 0]
    hidden = torch.ones(1, 4)
    for index in order:
        hidden = model[index](hidden)
    hidden.sum().backward()
    try:
        check.compare(lockstep)
        report(lockstep, words="")
    except OrderError as error:
        report(lockstep, words=str(error))


if __name__ == "__main__":
    main()
