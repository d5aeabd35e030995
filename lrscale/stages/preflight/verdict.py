"""What a preflight leaves behind: its findings beside the attempt's logs, and the nodes to leave out next time."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lrscale.config.diagnosis import Check, bad_nodes


def write_findings(run_dir: Path, folder: Path, findings: Sequence[Check]) -> None:
    """preflight.json in the attempt's folder, and lines in RUN_DIR/bad_nodes.txt; a disk that refuses is only told."""
    bad = bad_nodes(findings)
    try:
        if folder.is_dir():
            text = json.dumps([check.to_json() for check in findings], indent=1)
            (folder / "preflight.json").write_text(text + "\n", encoding="utf-8")
        if bad:
            add_bad_nodes(run_dir / "bad_nodes.txt", bad)
    except OSError as error:
        print(f"warning: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
    if bad:
        print(f"bad nodes, written to bad_nodes.txt: {', '.join(bad)}", file=sys.stderr)


def add_bad_nodes(path: Path, bad: dict[str, str]) -> None:
    """Adds `NAME reason` lines; a node that is named again keeps its newest reason."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if line.split(maxsplit=1)[:1] and line.split(maxsplit=1)[0] not in bad]
    kept += [f"{node} {' '.join(reason.split())}" for node, reason in bad.items()]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("\n".join(kept) + "\n", encoding="utf-8")
    temporary.replace(path)
