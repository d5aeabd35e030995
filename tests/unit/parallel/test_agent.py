"""What the process above the ranks says of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOST = """
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""
OTHER = """
import sys
from datetime import timedelta
from lrscale.parallel import agent, ranks
assert "torch" not in sys.modules, "too late to silence it"
if sys.argv[2] == "agent":
    ranks.import_torch_quietly()
import os
import torch.distributed as dist
assert "TORCH_CPP_LOG_LEVEL" not in os.environ, "ranks would inherit it"
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
print("here", flush=True)
try:
    store.wait(["never"], timedelta(seconds=60))
except dist.DistNetworkError:
    print("lost", flush=True)
"""


@pytest.mark.parametrize("who", ["agent", "rank"])
def test_an_agent_that_loses_the_store_of_the_first_one_says_nothing(who: str) -> None:
    """Locks out forty lines of C++ at the end of a sound run, from each node whose agent left last; ranks keep theirs."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        pipes: dict[str, int] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", *arguments], text=True, **pipes)

    with start(HOST) as host:
        assert host.stdout is not None
        with start(OTHER, host.stdout.readline().strip(), who) as other:
            assert other.stdout is not None and other.stdout.readline() == "here\n"
            host.kill()
            said, noise = other.communicate(timeout=60)
    assert said == "lost\n"
    assert ("TCPStore" in noise) == (who == "rank"), noise
