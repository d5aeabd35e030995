"""What was looked at before a run starts, on a login node and on every node of the job: one `Check` a finding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

State = Literal["ok", "warning", "failed", "not checked"]
_NAME = 14
"""Width of the names of checks: they are told one by one, so it is fixed."""
_INDENT = " " * (_NAME + 15)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. What could not be looked at is `not checked`, with the reason as `found`; never `ok`."""

    name: str
    state: State
    found: str
    needed: str = ""
    help: str = ""
    """What to do; every failed check has one."""
    node: str = ""
    """Where it was found; empty for what concerns no node in particular."""
    blames_node: bool = False
    """A failure that speaks against the node, not against the recipe: it can be left out of the next try."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Check:
        return cls(**value)

    @property
    def reason(self) -> str:
        """Given and needed, in one line."""
        return f"{self.name}: {self.found}" + (f"; needed {self.needed}" if self.needed else "")


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that forbid a start."""
    return [check for check in checks if check.state == "failed"]


def bad_nodes(checks: Sequence[Check]) -> dict[str, str]:
    """Nodes to leave out of the next try, each with its reasons.

    What fails in the same way on all of several nodes is the recipe's fault or the cluster's, and blames none.
    """
    nodes = {check.node for check in checks if check.node}
    bad: dict[str, list[str]] = {}
    for check in failed(checks):
        alike = {other.node for other in failed(checks) if other.name == check.name}
        if check.node and check.blames_node and (len(nodes) == 1 or alike != nodes):
            reasons = bad.setdefault(check.node, [])
            if check.reason not in reasons:
                reasons.append(check.reason)
    return {node: "; ".join(reasons) for node, reasons in bad.items()}


def described(checks: Sequence[Check]) -> str:
    """A line a finding for people, those of several nodes that are alike in one; the failed ones say what to do."""
    together: dict[Check, list[str]] = {}
    for check in checks:
        nodes = together.setdefault(replace(check, node=""), [])
        if check.node and check.node not in nodes:
            nodes.append(check.node)
    lines, names = [], list(dict.fromkeys(check.name for check in together))
    for check, nodes in sorted(together.items(), key=lambda item: names.index(item[0].name)):
        where = f"{', '.join(nodes)}: " if nodes else ""
        lines.append(f"{check.state:<11}  {check.name:<{_NAME}}  {where}{_indented(check.found)}")
        if check.needed and check.state != "ok":
            lines.append(f"{_INDENT}needed: {check.needed}")
        if check.help and check.state != "ok":
            lines.append(f"{_INDENT}help: {_indented(check.help)}")
    return "\n".join(lines)


def _indented(text: str) -> str:
    return text.replace("\n", f"\n{_INDENT}")
