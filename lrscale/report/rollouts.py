"""Shown rollouts: read from RUN/rollouts, written as HTML with their latent steps visible.

Everything in them was written by a model or comes from a data set: nothing reaches the page unescaped.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrscale.report.runs import Run

SHOWN = 20
"""Rollouts an arm shows."""
LONGEST_TEXT = 8000
"""Characters of a prompt or a segment that are shown."""
MOST_DOTS = 32

_MARKER = re.compile(r"&lt;implicit_thought&gt;\s*\d+\s*&lt;/implicit_thought&gt;")
_BOXED = re.compile(r"\\boxed\{[^{}]*\}")


def shown_rollouts(run: Run, arm: str) -> tuple[str, list[dict[str, Any]]]:
    """Where they are from, in words, and up to 20 rollouts: after RL, else the newest RL step's, else before RL."""
    folder = run.path / "rollouts"
    steps = sorted(folder.glob(f"{arm}-step-*.jsonl"), key=_step_number, reverse=True)
    for path, words in (
        (folder / f"evaluate-{arm}-after.jsonl", "evaluation after RL"),
        *((path, f"RL step {_step_number(path)}") for path in steps),
        (folder / f"evaluate-{arm}-before.jsonl", "evaluation before RL"),
    ):
        rollouts = _read(path)
        if rollouts:
            return words, rollouts[:SHOWN]
    return "", []


def rollout_html(rollout: Mapping[str, Any]) -> str:
    """One rollout as an <article>: result, length, the completion, the prompt folded away."""
    reward = rollout.get("reward")
    facts = [_reward_html(reward)]
    for key, words in (("tokens", "tokens"), ("latent_steps", "latent steps")):
        if rollout.get(key) is not None:
            facts.append(f"<span>{_escape(rollout[key])} {words}</span>")
    if rollout.get("advantage") is not None:
        facts.append(f"<span>advantage {_number(rollout['advantage'])}</span>")
    if rollout.get("stop_reason") == "length":
        facts.append('<span class="cut">cut at the length limit</span>')
    facts.append(f'<span class="id">{_escape(rollout.get("prompt_id", ""))}</span>')
    segments = rollout.get("segments")
    body = "".join(map(_segment_html, segments)) if isinstance(segments, list) else ""
    prompt = _text_html(str(rollout.get("prompt", "")))
    return (
        f'<article class="rollout"><div class="facts">{"".join(facts)}</div>'
        f'<div class="completion">{body}</div>'
        f"<details><summary>prompt</summary><div class='prompt'>{prompt}</div></details></article>"
    )


def latent_html(steps: int) -> str:
    """Latent steps as a pill of dots; many are shortened to a number."""
    dots = "●" * min(steps, MOST_DOTS) if steps <= MOST_DOTS else f"● × {steps}"  # noqa: RUF001 - a times sign is meant
    plural = "" if steps == 1 else "s"
    return f'<span class="latent" title="{steps} latent step{plural}" aria-label="{steps} latent step{plural}">{dots}</span>'


def _segment_html(segment: Any) -> str:
    if not isinstance(segment, Mapping):
        return ""
    steps = segment.get("latent_steps")
    if isinstance(steps, int) and not isinstance(steps, bool):
        return latent_html(steps) if steps > 0 else ""
    return _text_html(str(segment.get("text", "")))


def _text_html(text: str) -> str:
    """Escaped text with markers and boxed answers set off; newlines are kept by the style sheet."""
    left_out = len(text) - LONGEST_TEXT
    escaped = html.escape(text[:LONGEST_TEXT])
    escaped = _MARKER.sub(lambda found: f'<span class="marker">{found[0]}</span>', escaped)
    escaped = _BOXED.sub(lambda found: f'<span class="boxed">{found[0]}</span>', escaped)
    return escaped + (f'<span class="cut"> … {left_out:,} more characters</span>' if left_out > 0 else "")


def _reward_html(reward: Any) -> str:
    if not isinstance(reward, int | float):
        return '<span class="pill">not scored</span>'
    good = reward > 0
    return f'<span class="pill {"good" if good else "bad"}">{"✓" if good else "✗"} reward {_number(reward)}</span>'


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else _escape(value)


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _step_number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _read(path: Path) -> list[dict[str, Any]]:
    """The rollouts of a file; lines that a crash cut short are left out (they are shown, not counted)."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rollouts = []
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            rollouts.append(value)
    return rollouts
