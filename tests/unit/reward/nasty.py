"""A reward file that does everything that rewards should not; its completions say what."""

import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path


def hang():
    while True:
        time.sleep(1000)


def hang_in_native_code():
    """No signal but SIGKILL ends this."""
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    while True:
        ctypes.CDLL(None).sleep(1000)


def fork_children():
    """Daemons, in sessions of their own, that ignore what they can."""
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                hang_in_native_code()
            os._exit(0)


def fork_and_hang():
    fork_children()
    hang()


def come_back_twice():
    """The forked child returns from the reward as well."""
    os.fork()


def allocate():
    kept = []
    while True:
        kept.append(bytearray(1 << 24))


def print_megabytes():
    for _ in range(8):
        print("x" * (1 << 20))
        print("y" * (1 << 20), file=sys.stderr)
    os.write(1, b"z" * (1 << 20))


def change_seed():
    random.seed(1)


def use_multiprocessing():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]


def close_everything():
    os.closerange(0, 1000)


def send_garbage():
    """Whatever is written to the worker's sockets, it is no answer to another sample."""
    for descriptor in range(3, 300):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\x00\x00\x00\x00\x00\x00\x00\x04null")


def kill_parent():
    os.kill(os.getppid(), signal.SIGKILL)
    hang()


ACTS = {
    "hang": hang,
    "native": hang_in_native_code,
    "raise": lambda: 1 / 0,
    "interrupt": lambda: signal.raise_signal(signal.SIGINT),
    "exit": lambda: os._exit(3),
    "segfault": lambda: ctypes.string_at(0),
    "sys-exit": lambda: sys.exit(4),
    "daemons": fork_children,
    "daemons-hang": fork_and_hang,
    "twice": come_back_twice,
    "allocate": allocate,
    "print": print_megabytes,
    "seed": change_seed,
    "multiprocessing": use_multiprocessing,
    "close": close_everything,
    "garbage": send_garbage,
    "kill-parent": kill_parent,
}
ANSWERS = {"nan": [float("nan")], "infinity": [float("inf")], "none": None, "text": "1", "few": [], "many": [1.0, 1.0]}


def reward(completions, **columns):
    """The number that a completion is, but for those that name an act or an answer."""
    (completion,) = completions
    with Path(__file__).with_suffix(".pids").open("a") as file:
        file.write(f"{os.getpid()}\n")
    ACTS.get(completion, lambda: None)()
    if completion in ANSWERS:
        return ANSWERS[completion]
    return [float(completion) if completion.isdigit() else 0.5]
