"""The first step of a job: each rank looks at its node, then all look at each other, and agree on a verdict.

    own node and GPU  ->  the folder, seen by all  ->  connections between nodes  ->  one sum over all ranks

What failed so far is told before the next thing is tried, so that a broken node is named and not waited for.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from lrscale.config.diagnosis import Check, described, failed
from lrscale.config.recipe import Recipe
from lrscale.parallel.ranks import Ranks, node_name, set_threads
from lrscale.stages.preflight.files import check_files
from lrscale.stages.preflight.gpus import check_gpus, check_own_gpu
from lrscale.stages.preflight.meeting import Meeting
from lrscale.stages.preflight.memory import check_memory
from lrscale.stages.preflight.network import (
    check_all_reduce,
    leave,
    listening,
    own_address,
    reach_checks,
    unreachable,
)
from lrscale.stages.preflight.reward import check_reward
from lrscale.stages.preflight.sources import size_of, source_of
from lrscale.stages.preflight.storage import Canary, check_room, unshared
from lrscale.stages.preflight.tokens import check_tokenizer
from lrscale.stages.preflight.verdict import write_findings

_JOIN = timedelta(seconds=300)
_ANSWER_S = 300.0
"""For the slowest node: torch and transformers from a cold network file system."""
_VERDICT_S = 900.0
_BYE_S = 20.0


def look_together(recipe: Recipe, run_dir: Path) -> bool:
    """Whether the job may go on: the same answer on every rank. The main rank says and writes what was found."""
    ranks = Ranks.from_environment()
    set_threads(1)
    meeting = Meeting.join(ranks, _JOIN)
    meeting.tell("name", node_name())
    inspection = Inspection(recipe, run_dir, meeting)
    fine = inspection.lead() if ranks.is_main else inspection.follow()
    sys.stdout.flush()
    sys.stderr.flush()
    if not fine:  # without goodbye: a rank that is stuck would be waited for
        os._exit(4)
    return True


class Inspection:
    """One rank's part in it. Findings travel as JSON; each leader (local rank 0) speaks for its node."""

    def __init__(self, recipe: Recipe, run_dir: Path, meeting: Meeting) -> None:
        self.recipe, self.run_dir, self.meeting = recipe, run_dir, meeting
        self.ranks = meeting.ranks
        self.node = node_name()
        self.leads_node = self.ranks.local_rank == 0
        self.findings: list[Check] = []

    def lead(self) -> bool:
        """The main rank: looks like the others, hears them all, says and writes what was found."""
        print("preflight", file=sys.stderr)
        world = range(self.ranks.world_size)
        word = Canary.fresh_word()
        canary = Canary(self.run_dir, word)
        with ExitStack() as stack:
            stack.callback(canary.remove)
            self.meeting.tell("word", word)
            self._look_at_node(stack, canary, word)
            self._find("reward", lambda: [check_reward(self.recipe, self.run_dir)])
            self._report()
            answers = self.meeting.hear("node", world, _ANSWER_S)
            self._missing(answers.keys())
            leaders = {rank: answer for rank, answer in answers.items() if answer["address"]}
            self.meeting.tell("leaders", leaders)
            self._look_at_others(leaders, canary, word)
            told = self.meeting.hear("others", answers.keys(), _ANSWER_S)
            findings = [Check.from_json(value) for answer in told.values() for value in answer["checks"]]
            self._missing(told.keys())
            # The main rank's own first: findings of all are alike more often than not.
            findings += [check for check in self.findings if check not in findings]
            problems = {answer["name"]: answer["unreachable"] for answer in told.values() if answer["leads"]}
            findings += reach_checks(list(problems), problems)
        self._print(findings)
        ready = not failed(findings)
        self.meeting.tell("sum wanted", ready)
        last = check_all_reduce(self.meeting, *self._backend()) if ready else None
        last = last or Check("all-reduce", "not checked", "something else has failed")
        self._print([last])
        findings.append(last)
        write_findings(self.run_dir, self.run_dir / "attempts" / "latest", findings)
        return self._agree(fine=not failed(findings))

    def follow(self) -> bool:
        """The other ranks."""
        try:
            word = self.meeting.hear_main("word", _ANSWER_S)
            canary = Canary(self.run_dir, word)
            with ExitStack() as stack:
                self._look_at_node(stack, canary, word)
                self._report()
                self._look_at_others(self.meeting.hear_main("leaders", _VERDICT_S), canary, word)
                wanted = self.meeting.hear_main("sum wanted", _VERDICT_S)
            if wanted:
                check_all_reduce(self.meeting, *self._backend())
            fine = bool(self.meeting.hear_main("verdict", _VERDICT_S))
        except TimeoutError as error:
            print(f"error: preflight on {self.node}: {error}", file=sys.stderr)
            return False
        if fine:
            leave(self.ranks)
        self.meeting.tell("bye", value=True)
        return fine

    def _look_at_node(self, stack: ExitStack, canary: Canary, word: str) -> None:
        recipe, node = self.recipe, self.node
        self.address: tuple[str, int] | None = None
        self._find("GPU arithmetic", lambda: check_own_gpu(recipe, self.ranks, node))
        if not self.leads_node:
            return
        self._find("GPUs", lambda: check_gpus(recipe, node))
        self._find("model files", lambda: check_files(recipe, node))
        self._find("host memory", self._sizes)
        self._find("shared folder", lambda: self._put(canary))
        self._find("network", lambda: self._listen(stack, word))

    def _sizes(self) -> list[Check]:
        """What depends on the model's size; the tokenizer and the folder's room are looked at once, by the main rank."""
        recipe, main = self.recipe, self.ranks.is_main
        source = source_of(recipe)
        if isinstance(source, Check):
            return [] if failed(self.findings) else [replace(source, node=self.node, blames_node=True)]
        size = size_of(recipe, source)
        checks = check_tokenizer(recipe, source) if main else []
        if isinstance(size, Check):
            return [*checks, size]
        return [
            *checks,
            *([check_room(recipe, self.run_dir, size)] if main else []),
            check_memory(recipe, size, self.node),
        ]

    def _put(self, canary: Canary) -> list[Check]:
        try:
            canary.put(self.node)
        except OSError as error:
            return [unshared(self.run_dir, f"{error.filename} cannot be written: {error.strerror}", self.node)]
        return []

    def _listen(self, stack: ExitStack, word: str) -> list[Check]:
        if self.ranks.world_size > 1:
            address = own_address(self.ranks.host)
            self.address = (address, stack.enter_context(listening(address, word)))
        return []

    def _report(self) -> None:
        self.meeting.tell("node", {"name": self.node, "address": self.address})

    def _look_at_others(self, leaders: dict[str, dict], canary: Canary, word: str) -> None:
        """The main node's file and all nodes' ports, by each leader; all nodes' files by the main rank."""
        problems: dict[str, str] = {}
        if not leaders and self.ranks.is_main:
            self.findings.append(Check("shared folder", "not checked", "one node"))
        if self.leads_node and leaders:
            peers = {answer["name"]: tuple(answer["address"]) for answer in leaders.values()}
            first = next(iter(peers))
            wanted = list(peers) if self.ranks.is_main else [first]
            self._find("shared folder", lambda: self._look_for(canary, wanted, list(peers)))
            problems = unreachable({name: at for name, at in peers.items() if name != self.node}, word)
        answer = {"name": self.node, "leads": self.leads_node, "unreachable": problems}
        self.meeting.tell("others", answer | {"checks": [check.to_json() for check in self.findings]})

    def _look_for(self, canary: Canary, wanted: list[str], nodes: list[str]) -> list[Check]:
        problems = {name: canary.problem_with(name) for name in wanted}
        checks = [unshared(self.run_dir, problem, name) for name, problem in problems.items() if problem]
        if checks and not self.ranks.is_main:
            return [unshared(self.run_dir, problems[wanted[0]], self.node)]
        if checks or not self.ranks.is_main:
            return checks
        if len(nodes) == 1:
            return [Check("shared folder", "not checked", "one node")]
        return [Check("shared folder", "ok", f"{self.run_dir}: {len(nodes)} nodes see what the others write")]

    def _find(self, name: str, look: Callable[[], list[Check]]) -> None:
        """What a look finds; one that fails itself is a finding too."""
        try:
            self.findings += look()
        except Exception as error:  # noqa: BLE001 - a node that cannot even be looked at is named, and the rest goes on
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            help_ = "if other nodes pass, look at this one; else this is a bug in lrscale"
            self.findings.append(
                Check(name, "failed", found, needed="a look", help=help_, node=self.node, blames_node=True)
            )

    def _missing(self, answered: Iterable[int]) -> None:
        """A finding a node with ranks that have not answered, under the name that they gave first."""
        world, there = range(self.ranks.world_size), set(answered)
        names = self.meeting.hear("name", world, limit_s=0)
        silent = [rank for rank in world if rank not in there]
        for rank in silent:
            found = f"rank {rank} has not answered for {_ANSWER_S:g} s"
            help_ = "look at that node: is it up, is its file system stuck?"
            check = Check("answer", "failed", found, "an answer", help_, names.get(rank, ""), blames_node=True)
            self.findings.append(check)

    def _backend(self) -> tuple[str, torch.device]:
        if self.recipe.model.device == "cpu" or not torch.cuda.is_available():
            return "gloo", torch.device("cpu")
        device = torch.device("cuda", self.ranks.local_rank)
        torch.cuda.set_device(device)
        return "nccl", device

    def _print(self, findings: list[Check]) -> None:
        print(described(findings), file=sys.stderr, flush=True)

    def _agree(self, *, fine: bool) -> bool:
        self.meeting.tell("verdict", fine)
        if fine:
            leave(self.ranks)
        # The store may live in this process: it goes last.
        self.meeting.hear("bye", range(1, self.ranks.world_size), _BYE_S if fine else 2.0)
        print("preflight passed" if fine else "preflight failed: nothing was started", file=sys.stderr)
        return fine
