"""SLURM's words for why a job waits or ended, in plain ones."""

from __future__ import annotations

import re

_WAITING = {
    "Priority": "other jobs come first",
    "Resources": "nodes have to become free",
    "BeginTime": "its start time has not come",
    "Dependency": "another job has to end first",
    "DependencyNeverSatisfied": "a job that it depends on failed: it will never start",
    "JobHeldUser": "held by you: scontrol release JOB",
    "JobHeldAdmin": "held by an administrator",
    "JobLaunchFailure": "it could not be started on a node: look at the node's slurmd log",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is closed",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows: it will not start",
    "PartitionTimeLimit": "it asks for more time than its partition allows: it will not start",
    "NodeDown": "a node that it asks for is down",
    "BadConstraints": "no node can ever fulfil what it asks for: it will not start",
    "Reservation": "it waits for its reservation",
    "Licenses": "it waits for licences",
    "Cleaning": "its former nodes are being cleaned up",
}
_ENDED = {
    "TIMEOUT": "its time limit was reached",
    "NODE_FAIL": "a node failed",
    "PREEMPTED": "a job of higher priority took its nodes",
    "OUT_OF_MEMORY": "a node ran out of host memory",
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "its deadline was reached",
    "CANCELLED": "cancelled",
    "FAILED": "its batch script failed",
    "COMPLETED": "its batch script ended without a word",
}


def waiting(reason: str) -> str:
    """`nodes have to become free (Resources)`; whatever is not known is given as it is."""
    word = reason.split(",")[0].strip("() ")
    if word.startswith("ReqNodeNotAvail"):
        return f"nodes that it asks for are down or reserved ({reason})"
    if re.match(r"(QOS|Assoc)", word):
        return f"a limit of your account or QOS is reached ({reason})"
    plain = _WAITING.get(word)
    return f"{plain} ({reason})" if plain else reason


def ended(state: str, reason: str = "") -> str:
    """Of a job that is over."""
    plain = _ENDED.get(state, state.lower())
    words = [word for word in (state, reason) if word]
    return f"{plain} ({', '.join(words)})"
